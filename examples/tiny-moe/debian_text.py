"""Four kinds of text out of Debian packages, for a second model that shares no text with the embedded one.

    python examples/tiny-moe/debian_text.py /tmp/text

German manual pages, an English dictionary, C++ headers and Emacs Lisp: one file `KIND.txt` of at most 8 million
characters each. It needs `apt-get download` and `dpkg`, and installs nothing.
"""

import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer
from tqdm import tqdm

PACKAGES = {
    "german": ("manpages-de", "usr/share/man/de/**/*.gz"),
    "dictionary": ("dict-gcide", "usr/share/dictd/gcide.dict.dz"),
    "cpp": ("libboost1.74-dev", "usr/include/boost/[a-m]*/**/*.hpp"),
    "lisp": ("emacs-el", "usr/share/emacs/*/lisp/**/*.el.gz"),
}
MOST_CHARACTERS = 8_000_000


def unpacked(package: str, scratch: Path) -> Path:
    """The files of a package, in a directory of their own."""
    subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, capture_output=True)
    (archive,) = scratch.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", archive, scratch / package], check=True)
    return scratch / package


def texts(files: list[Path]) -> Iterator[str]:
    """What they say, without comments of manual pages and the requests that set type."""
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        text = content.decode("utf-8", errors="ignore")
        if "man" in path.parts:
            text = re.sub(r"\\f[A-Z]|\\(?=-)|^\.\\\".*\n|^\.[A-Z]+ ?", "", text, flags=re.MULTILINE)
        yield text.strip() + "\n\n"


def main(output_dir: Path) -> None:
    """Write the files into a directory, which is made if need be."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (package, pattern) in tqdm(PACKAGES.items(), unit="package"):
            files = sorted(unpacked(package, Path(scratch)).glob(pattern))
            text = "".join(texts([path for path in files if path.is_file()]))
            (output_dir / f"{kind}.txt").write_text(text[:MOST_CHARACTERS], encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
