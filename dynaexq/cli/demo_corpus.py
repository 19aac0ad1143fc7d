"""Three kinds of text that every Python installation carries: prose, code and arithmetic.

The embedded model is trained on this text and the demo, tests and benchmarks draw their workloads from the part
that training never saw. Nothing is downloaded: prose is the standard library's docstrings and `pydoc` topics, code
is its source with the docstrings taken out, arithmetic is generated. `Corpus` puts a directory of other text in their
place. This module knows nothing of tokens or models.
"""

import ast
import inspect
import random
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Domain = Literal["prose", "code", "arithmetic"]
Split = Literal["train", "held-out"]

DOMAINS: tuple[Domain, ...] = ("prose", "code", "arithmetic")

_NOT_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
_HELD_OUT_ONE_IN = 10
_SHORTEST_DOCSTRING = 160  # characters; below this a docstring is a label, not prose

_BLOCK, _PIECE = 40_000, 4_000  # characters of a file that fall in one split, and of one document

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kim", "Leo", "Mia", "Ned", "Olga")
_THINGS = ("apples", "books", "coins", "stamps", "pears", "cards", "marbles", "pens", "eggs", "tickets")


def documents(domain: Domain, split: Split = "held-out", seed: int = 0) -> Iterator[str]:
    """Yield the documents of one domain in a shuffled order fixed by `seed`.

    A source file and its docstrings always fall in the same split, one file in ten being held out. Arithmetic
    never ends; its two splits draw from different random streams.

    Raises:
        ValueError: `domain` or `split` is not one of those above.
    """
    if domain not in DOMAINS or split not in ("train", "held-out"):
        raise ValueError(f"expected a domain of {DOMAINS} and split 'train' or 'held-out', got {domain!r}, {split!r}")
    rng = random.Random(f"{seed}/{split}")
    if domain == "arithmetic":
        while True:
            yield "\n".join(_exercise(rng) for _ in range(24)) + "\n"
    texts = list(_prose(split) if domain == "prose" else _code(split))
    rng.shuffle(texts)
    yield from texts


@dataclass(frozen=True)
class Corpus:
    """Kinds of text, each in a part to train on and a part held out.

    Args:
        directory: of files `KIND.txt`, each the text of one kind; None for the three kinds of every Python.
    """

    directory: Path | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Their names, in a fixed order. Raises FileNotFoundError where the directory has none."""
        if self.directory is None:
            return DOMAINS
        found = tuple(sorted(path.stem for path in self.directory.glob("*.txt")))
        if not found:
            raise FileNotFoundError(f"expected files KIND.txt in {self.directory}, one for each kind of text")
        return found

    def documents(self, kind: str, split: Split = "held-out", seed: int = 0) -> Iterator[str]:
        """Yield the documents of one kind in a shuffled order fixed by `seed`; see `documents`.

        Of a file, one block of 40,000 characters in ten is held out; a document is a tenth of a block.
        """
        if self.directory is None:
            yield from documents(kind, split, seed)  # type: ignore[arg-type]  # which says what is wrong with it
            return
        text = (self.directory / f"{kind}.txt").read_text(encoding="utf-8")
        blocks = (text[at : at + _BLOCK] for at in range(0, len(text), _BLOCK))
        kept = [
            block for index, block in enumerate(blocks) if (index % _HELD_OUT_ONE_IN == 0) == (split == "held-out")
        ]
        pieces = [block[at : at + _PIECE] for block in kept for at in range(0, len(block), _PIECE)]
        random.Random(f"{seed}/{split}").shuffle(pieces)
        yield from pieces


def _in_split(name: str, split: Split) -> bool:
    return (zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0) == (split == "held-out")


def _modules(split: Split) -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_LIBRARY & set(name.parts) or not _in_split(name.as_posix(), split):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first


def _prose(split: Split) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        if _in_split(f"topic/{name}", split):
            yield text.strip() + "\n"
    for _, tree in _modules(split):
        for node in _docstring_nodes(tree):
            text = inspect.cleandoc(node.value.value)  # type: ignore[attr-defined]
            if len(text) >= _SHORTEST_DOCSTRING:
                yield text + "\n"


def _code(split: Split) -> Iterator[str]:
    for source, tree in _modules(split):
        lines = source.splitlines(keepends=True)
        for node in _docstring_nodes(tree):
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[line] = ""
        text = "".join(lines).strip()
        if text:
            yield text + "\n"


def _exercise(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    low, high = min(a, b), max(a, b)
    who, what = rng.choice(_NAMES), rng.choice(_THINGS)
    return rng.choice(
        (
            f"{a} + {b} = {a + b}",
            f"{high} - {low} = {high - low}",
            f"{a} * {c} = {a * c}",
            f"{a * c} / {c} = {a}",
            f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}",
            f"{who} has {a} {what} and buys {b} more. {who} now has {a} + {b} = {a + b} {what}.",
            f"{who} has {high} {what} and gives away {low}. {who} keeps {high} - {low} = {high - low} {what}.",
            f"{who} fills {c} boxes with {a} {what} each. That makes {c} * {a} = {c * a} {what}.",
            f"{who} shares {a * c} {what} among {c} friends. Each one gets {a * c} / {c} = {a} {what}.",
        )
    )
