"""One door for bytes from outside: a file is a regular file or is refused, and what is read of it is bounded.

It knows no format. Each kind of file has one error, which its reader hands in.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from dynaexq.safeguards.system_files import flags

MOST_TEXT = 32 * 2**20
"""Bytes of JSON that are read at most: a header or an index of the largest models takes a third of it."""


def open_regular(path: Path | str, error: type[Exception], remedy: str) -> int:
    """A descriptor of the regular file `path`, open for reading. It never waits, as opening a FIFO would.

    Raises:
        error: there is none, or it is a directory, a FIFO or a device; the message ends with `remedy`.
    """
    try:
        file = os.open(path, flags("O_RDONLY", "O_NONBLOCK", "O_CLOEXEC"))
    except (OSError, ValueError) as problem:  # a ValueError: a NUL in the name
        raise error(f"cannot open {path}: {getattr(problem, 'strerror', problem)}; {remedy}") from problem
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(f"expected a file, {path} is a directory, a pipe or a device; {remedy}")
    return file


def read_bytes(path: Path | str, error: type[Exception], remedy: str, most: int = MOST_TEXT) -> bytes:
    """The content of the regular file `path`, which must not have more than `most` bytes. Raises `error`."""
    with os.fdopen(open_regular(path, error, remedy), "rb") as file:
        try:
            content = file.read(most + 1)
        except OSError as problem:
            raise error(f"cannot read {path}: {problem}; {remedy}") from problem
    if len(content) > most:
        raise error(f"{path} has more than the {most:,} bytes that such a file may have; {remedy}")
    return content


def read_json(path: Path | str, error: type[Exception], remedy: str) -> Any:
    """What the JSON file `path` holds. Raises `error`."""
    try:
        return parse_json(read_bytes(path, error, remedy))
    except ValueError as problem:
        raise error(f"{path} cannot be read as JSON ({problem}); {remedy}") from problem


def parse_json(text: bytes | str) -> Any:
    """JSON from outside: a ValueError for whatever is wrong with it, also for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise ValueError("nested too deep") from problem
