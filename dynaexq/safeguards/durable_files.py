"""One writer for all files: written beside, synced, put in the place of the old one in one step, by one at a time.

A crash leaves the old file or the new one. What is replaced keeps its permissions, and a link points where it did.
What is being written belongs to its writer alone until it is there; what a writer that died has left is removed
by the next. A place that cannot be written to is refused before the work is done.
"""

import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynaexq.safeguards.system_files import flags, is_owners_alone, sync, try_to_lock

logger = logging.getLogger(__name__)

PAUSE = 0.02
"""Seconds between two looks of a writer that waits for another."""

_STAGING = "-unfinished-"


@contextmanager
def replacing(path: Path | str, error: type[Exception] = OSError) -> Iterator[Path]:
    """An empty file that takes the place of `path` when the block ends without an exception.

    A second writer of the same place waits for the first.

    Raises:
        error: the place cannot be written to; said before the block begins, where that can be known.
    """
    target = place_for(path, error)
    try:
        with sole_writer(target.with_name(f".{target.name}.lock"), target):
            remove_stale(target, target.parent)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}{_STAGING}", dir=target.parent)
            os.close(handle)
            staging = Path(name)
            try:
                yield staging
                replace_file(staging, target)
            finally:
                staging.unlink(missing_ok=True)
    except OSError as problem:
        if isinstance(problem, error):
            raise
        raise error(f"cannot write {target}: {problem}; free some space, or write elsewhere") from problem


def replace_file(new: Path, old: Path) -> None:
    """Put the file `new` in the place of `old`, on disk as well, with the permissions of `old`, or of a new file."""
    if new.stat().st_nlink == 1:  # else its permissions are those of another name, too
        new.chmod(_mode_of(old))
    sync(new)
    new.replace(old)
    sync(old.parent)


def write_text(path: Path | str, text: str) -> None:
    """Put `text` in the place of the file `path`. Raises OSError."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def place_for(path: Path | str, error: type[Exception]) -> Path:
    """Where a file `path` would come to lie, links followed; `error` where none can."""
    path = Path(path)
    target = path.resolve()
    if path.is_symlink() and not target.exists():
        raise error(f"{path} is a link to {target}, where there is nothing; remove the link, or write elsewhere")
    if target.exists() and not target.is_file():
        raise error(f"expected the place of a file, {target} is a directory, a pipe or a device; write elsewhere")
    if not target.parent.is_dir():
        raise error(f"there is no directory {target.parent} to write {target.name} to; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise error(f"nothing may be written to {target.parent}; write elsewhere")
    return target


@contextmanager
def sole_writer(lock: Path, target: Path) -> Iterator[None]:
    """Hold the lock file `lock`, which is gone afterwards; waits for another process or thread that holds it.

    The lock is the system's, so that it goes with a process that is killed.
    """
    handle = _locked(lock, target)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held: the next one will look whether it is still there
        os.close(handle)


def staging_directory(target: Path, home: Path) -> Path:
    """A new private directory in `home` for what is to take the place of `target`, or to come into it."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}{_STAGING}", dir=home))


def remove_stale(target: Path, home: Path) -> None:
    """Remove from `home` what writers of `target` have left that died; called by its sole writer."""
    for entry in home.iterdir():
        if entry.name.startswith(f".{target.name}{_STAGING}") and is_private(entry):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def is_private(path: Path) -> bool:
    """Whether `path` is itself no link, and belongs to this user, and no other user can have written it."""
    status = path.lstat()
    return not stat.S_ISLNK(status.st_mode) and is_owners_alone(status)


def new_mode(base: int) -> int:
    """The permissions of a new file (0o666) or directory (0o777), under the user's mask."""
    mask = os.umask(0)
    os.umask(mask)
    return base & ~mask


def _mode_of(target: Path) -> int:
    return stat.S_IMODE(target.stat().st_mode) if target.exists() else new_mode(0o666)


def _locked(lock: Path, target: Path) -> int:
    told = False
    while True:
        handle = os.open(lock, flags("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_CLOEXEC"), 0o600)
        try:
            is_ours = try_to_lock(handle)
            if is_ours and _lies_at(handle, lock):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if is_ours:
            continue  # its last holder has removed the file
        if not told:
            logger.warning("another process or thread is writing %s; waiting for that to end", target)
            told = True
        time.sleep(PAUSE)


def _lies_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`, which its last holder may have removed."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
