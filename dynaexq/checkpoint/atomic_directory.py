"""Replace a checkpoint directory in one step: a crash leaves the old one or the new one, and never a mixture.

Where a directory cannot be exchanged (a mount point, or one whose parent belongs to another user) its files are
replaced one by one, the index last. A crash in the middle of that leaves a directory without an index, which no loader
takes for a checkpoint.
"""

import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynaexq.errors import CheckpointError
from dynaexq.safeguards.durable_files import (
    is_private,
    new_mode,
    remove_stale,
    sole_writer,
    staging_directory,
    sync,
    write_text,
)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_JOURNAL = "dynaexq-source.json"
_INDEX_SUFFIX = ".index.json"


@contextmanager
def replaced(directory: Path | str, journal: str | None = None, nbytes: int = 0) -> Iterator[Path]:
    """A staging directory that takes the place of `directory` when the block ends without an error.

    What the old directory holds besides, and is no weights, is carried over: a tokenizer, say, or a directory.
    The old one goes in one step, where the file system can exchange two directories; elsewhere in two. A second
    writer of the same place waits for the first.

    Args:
        journal: what the content depends on. Then a block that fails keeps what it has done, and the next one with
            the same journal finds it.
        nbytes: what will be written, where that is known.

    Raises:
        CheckpointError: the place cannot be written, is a file, or has not the space; known before the block begins.
    """
    target = _place_for(directory)
    within = _must_stay(target)
    try:
        home = target if within else target.parent
        home.mkdir(parents=True, exist_ok=True)
        _check_space(home, nbytes)
        with sole_writer(home / f".{target.name}.lock", target):
            _restore(target)
            remove_stale(target, within)
            staging = staging_directory(target, within) if journal is None else _resumed(target, within, journal)
            try:
                yield staging
                (staging / _JOURNAL).unlink(missing_ok=True)
                if within:
                    _publish_files(staging, target)
                else:
                    _publish(staging, target)
            except BaseException:
                if journal is None:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}; free some space, or choose another place") from error


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or says where they are."""
    return name.endswith(
        (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
    )


def _place_for(directory: Path | str) -> Path:
    target = Path(directory).resolve()
    if Path(directory).is_symlink() and not target.exists():
        raise CheckpointError(
            f"{directory} is a link to {target}, where there is nothing; remove it, or save elsewhere"
        )
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"expected a directory to save in, found the file {target}; choose another place")
    return target


def _must_stay(target: Path) -> bool:
    """Whether `target` is a directory that nothing else can take the place of."""
    if not target.is_dir():
        return False
    return os.path.ismount(target) or target in _mount_points() or not os.access(target.parent, os.W_OK | os.X_OK)


def _mount_points() -> set[Path]:
    """Where something is mounted, also within one file system, as Linux lists it; empty elsewhere."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return set()
    return {Path(line.split()[4].replace("\\040", " ")) for line in lines}


def _check_space(home: Path, nbytes: int) -> None:
    free = shutil.disk_usage(home).free
    if nbytes > free:
        raise CheckpointError(
            f"cannot write {nbytes:,} bytes to {home}: {free:,} are free; free some space, or choose another place"
        )


def _resumed(target: Path, within: bool, journal: str) -> Path:
    """A staging directory with what was done for the same `journal` before, by this user alone."""
    staging = (target if within else target.parent) / f".{target.name}-unfinished"
    known = staging / _JOURNAL
    if staging.is_dir() and is_private(staging) and known.is_file() and known.read_text() == journal:
        return staging
    if staging.is_symlink() or (staging.exists() and not is_private(staging)):
        raise CheckpointError(
            f"{staging} is in the way, and was made by another user or can be written by others; remove it, or "
            "choose another place"
        )
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(mode=0o700)
    write_text(known, journal)
    return staging


def _restore(target: Path) -> None:
    """Put back the old directory, if its writer died between the two steps in which it was replaced."""
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        aside.rename(target)
    elif aside.is_dir():
        shutil.rmtree(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}-replaced")


def _carry_over(old: Path, new: Path) -> None:
    for entry in sorted(old.iterdir()):
        place = new / entry.name
        if place.exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, place, symlinks=True, copy_function=lambda a, b: link_or_copy(Path(a), Path(b)))
        elif not is_weights(entry.name):
            shutil.copyfile(entry, place)


def _publish(staging: Path, target: Path) -> None:
    if target.is_dir():
        _carry_over(target, staging)
        staging.chmod(stat.S_IMODE(target.stat().st_mode))
    else:
        staging.chmod(new_mode(0o777))
    _sync_all(staging)
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        shutil.rmtree(staging, ignore_errors=True)  # which is now the old directory
    else:
        aside = _aside(target)
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside)
    sync(target.parent)


def _publish_files(staging: Path, target: Path) -> None:
    """Move what is in `staging` into `target`, one by one, and remove the weights that it replaces."""
    _sync_all(staging)
    for index in target.glob(f"*{_INDEX_SUFFIX}"):
        index.unlink()
    sync(target)
    for file in sorted(staging.iterdir(), key=lambda file: file.name.endswith(_INDEX_SUFFIX)):
        file.replace(target / file.name)
    names = set(_named_by_index(target))
    for file in target.iterdir():
        if names and file.is_file() and is_weights(file.name) and file.name not in names:
            file.unlink()
    sync(target)
    staging.rmdir()


def _named_by_index(target: Path) -> Iterator[str]:
    for index in target.glob(f"*{_INDEX_SUFFIX}"):
        yield index.name
        yield from json.loads(index.read_text())["weight_map"].values()


def _sync_all(directory: Path) -> None:
    for file in [path for path in directory.iterdir() if path.is_file()] + [directory]:
        sync(file)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise CheckpointError(f"cannot put the new checkpoint in the place of {other}: {os.strerror(number)}")
