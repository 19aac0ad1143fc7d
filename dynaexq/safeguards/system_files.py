"""What systems do differently with open files: reading by position, reserving, locking. Windows has other calls."""

import os
import stat
import threading
from functools import partial
from pathlib import Path

_turn = threading.Lock()


def flags(*names: str) -> int:
    """The flags of `os.open` of these names, as far as this system has them, and bytes as they are."""
    return sum(getattr(os, name, 0) for name in {*names, "O_BINARY"})


def read_at(file: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` on; how many bytes there were. Threads may read at once."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    with _turn:
        os.lseek(file, offset, os.SEEK_SET)
        content = os.read(file, len(buffer))
    buffer[: len(content)] = content
    return len(content)


def write_at(file: int, content: memoryview, offset: int) -> int:
    """Write `content` at `offset`; how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, content, offset)
    with _turn:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, content)


def reserve(file: int, nbytes: int) -> None:
    """Give `file` so many bytes of disk; where that cannot be asked for, a full disk shows when they are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)


def try_to_lock(file: int) -> bool:
    """Whether the lock of `file` was free, and is this process's now, until `file` is closed."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        lock = partial(msvcrt.locking, file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        lock = partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        lock()
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_owners_alone(status: os.stat_result) -> bool:
    """Whether what has this `status` belongs to this user, and no other can have written it.

    Windows tells neither; there a user's own directories are private as they come.
    """
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def sync(path: Path) -> None:
    """Have the system bring a file, or the entries of a directory, to disk."""
    if os.name == "nt" and stat.S_ISDIR(path.stat().st_mode):
        return  # it has no such call, and renames are in its journal
    handle = os.open(path, flags("O_RDWR" if os.name == "nt" else "O_RDONLY"))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
