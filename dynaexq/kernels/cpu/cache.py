"""Where compiled kernels are kept: a directory of this user alone, in files that show whether they are whole.

A library that others could have written is never loaded, and nothing is loaded whose content is not what its compiler
made. The SHA-256 of the library stands behind it, in the last 32 bytes of its file, which the loader ignores.
"""

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dynaexq.safeguards.durable_files import is_private, place_for, replacing, sole_writer
from dynaexq.safeguards.outside_files import read_bytes

logger = logging.getLogger(__name__)

_DIGEST_NBYTES = hashlib.sha256().digest_size
_MOST = 2**26


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The library `name`, from the cache or built into it by `build(path)`; damaged ones are built anew.

    Raises:
        OSError: it cannot be written.
    """
    library = cache_directory() / name
    if not is_whole(library):
        place_for(library, OSError)
        with sole_writer(library.with_name(f".{name}.build"), library):
            if not is_whole(library):  # else the one that was waited for has built it
                if library.is_symlink():
                    library.unlink()  # what it points to is not replaced
                with replacing(library) as unfinished:
                    build(unfinished)
                    content = unfinished.read_bytes()
                    unfinished.write_bytes(content + hashlib.sha256(content).digest())
                library.chmod(0o700)
    return library


def is_whole(library: Path) -> bool:
    """Whether the file is this user's own, and holds what was once compiled."""
    if not library.is_file() or not is_private(library):
        return False
    try:
        content = read_bytes(library, OSError, "compile it again", _MOST)
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_NBYTES]).digest() == content[-_DIGEST_NBYTES:]


def cache_directory() -> Path:
    """DYNAEXQ_CACHE_DIR, or `~/.cache/dynaexq`; a temporary one of this process where others could write there."""
    try:
        directory = Path(os.environ.get("DYNAEXQ_CACHE_DIR") or Path.home() / ".cache" / "dynaexq")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(directory.resolve()) and os.access(directory, os.W_OK | os.X_OK):
            return directory
        problem = f"{directory} belongs to another user, or others may write there"
    except (OSError, RuntimeError) as error:  # a RuntimeError: this user has no home
        problem = str(error)
    return _temporary_directory(problem)


@cache
def _temporary_directory(problem: str) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="dynaexq-"))
    logger.warning(
        "compiled kernels are kept for this process only: %s; set DYNAEXQ_CACHE_DIR to a directory of your own",
        problem,
    )
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
