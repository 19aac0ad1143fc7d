"""Replace a checkpoint directory in one step: a crash leaves the old one or the new one, and never a mixture."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynaexq.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replaced(directory: Path | str, staging: Path | None = None) -> Iterator[Path]:
    """A staging directory that takes the place of `directory` when the block ends without an error.

    What the old directory holds besides, and is no weights, is carried over: a tokenizer, say, or a directory.
    The old one goes in one step, where the file system can exchange two directories; elsewhere in two.

    Args:
        staging: an existing directory beside it to go on with; it is kept when the block fails.

    Raises:
        CheckpointError: the place cannot be written, or is a file.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"expected a directory to save in, found the file {target}; choose another place")
    resumed = staging is not None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if staging is None:
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}; choose another place") from error
    try:
        yield staging
        if target.is_dir():
            _carry_over(target, staging)
        _publish(staging, target)
    except BaseException:
        if not resumed:
            shutil.rmtree(staging, ignore_errors=True)
        raise


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
    _open_to_all(staging)
    for file in [path for path in staging.iterdir() if path.is_file()] + [staging]:
        _sync(file)
    if not target.exists():
        staging.rename(target)
        _sync(target.parent)
        return
    if not _exchange(staging, target):
        aside = staging.with_name(staging.name + "-old")
        target.rename(aside)
        staging.rename(target)
        staging = aside
    _sync(target.parent)
    shutil.rmtree(staging)  # which is now the old directory


def _open_to_all(directory: Path) -> None:
    """Temporary directories are private; a checkpoint gets the permissions that any new directory would."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
