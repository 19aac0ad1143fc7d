"""Put a checkpoint where it belongs: a crash leaves the old one or the new one, and never a mixture.

A new directory appears whole, in one step. In a directory that is there, which may be a mount point or the working
directory of a program, others are at home: only files of the old checkpoint are replaced or removed. New shards get
names that the old index does not know, and the new index, which is put in last, decides.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynaexq.checkpoint.shard_index import INDEX, is_file_name, read_index, write_index
from dynaexq.errors import CheckpointError
from dynaexq.safeguards.durable_files import (
    is_private,
    new_mode,
    remove_stale,
    replace_file,
    sole_writer,
    staging_directory,
    write_text,
)
from dynaexq.safeguards.outside_files import read_json
from dynaexq.safeguards.system_files import sync

_JOURNAL = "dynaexq-source.json"
_ARRIVING = "-arriving.json"
_SHARD = ".safetensors"


@contextmanager
def replaced(directory: Path | str, journal: str | None = None, nbytes: int = 0) -> Iterator[Path]:
    """A staging directory whose files come into `directory` when the block ends without an error.

    Weights that an index names there, and no longer names afterwards, are removed; everything else stays as it is.
    A second writer of the same place waits for the first.

    Args:
        journal: what the content depends on. Then a block that fails keeps what it has done, and the next one with
            the same journal finds it.
        nbytes: what will be written, where that is known.

    Raises:
        CheckpointError: the place cannot be written, is a file, or has not the space; known before the block begins.
    """
    target = _place_for(directory)
    try:
        with _sole_writer(target) as within:
            home = target if within else target.parent
            _check_space(home, nbytes)
            remove_stale(target, home)
            if within:
                _finish_arrival(target)
            staging = staging_directory(target, home) if journal is None else _resumed(target, home, journal)
            try:
                yield staging
                (staging / _JOURNAL).unlink(missing_ok=True)
                if within:
                    _move_into(staging, target)
                else:
                    _appear(staging, target)
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


def _place_for(directory: Path | str) -> Path:
    if not os.fspath(directory):
        raise CheckpointError('expected a directory to save in, got ""; "." is the working directory')
    target = Path(directory).resolve()
    if Path(directory).is_symlink() and not target.exists():
        raise CheckpointError(
            f"{directory} is a link to {target}, where there is nothing; remove it, or save elsewhere"
        )
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"expected a directory to save in, found the file {target}; choose another place")
    return target


@contextmanager
def _sole_writer(target: Path) -> Iterator[bool]:
    """Hold the lock of `target`, which lies within it where it is there; yields whether it is."""
    while True:
        within = target.is_dir()
        home = target if within else target.parent
        home.mkdir(parents=True, exist_ok=True)
        with sole_writer(home / f".{target.name}.lock", target):
            if target.is_dir() == within:  # else another writer has made it meanwhile
                yield within
                return


def _check_space(home: Path, nbytes: int) -> None:
    free = shutil.disk_usage(home).free
    if nbytes > free:
        raise CheckpointError(
            f"cannot write {nbytes:,} bytes to {home}: {free:,} are free; free some space, or choose another place"
        )


def _resumed(target: Path, home: Path, journal: str) -> Path:
    """A staging directory with what was done for the same `journal` before, by this user alone."""
    staging = home / f".{target.name}-unfinished"
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


def _appear(staging: Path, target: Path) -> None:
    """Make `staging` the directory `target`, which is not there."""
    staging.chmod(new_mode(0o777))
    for file in _files(staging):
        sync(staging / file)
    sync(staging)
    staging.rename(target)
    sync(target.parent)


def _move_into(staging: Path, target: Path) -> None:
    """Move the files of `staging` into `target`, the index last, and remove weights that only the old index names."""
    old = _indexed(target) or set()
    _rename_shards(staging, target)
    new = _indexed(staging) or set()
    write_text(_arriving(target), json.dumps(sorted(old | new)))
    files = _files(staging)
    for file in sorted(files, key=lambda file: (file == Path(INDEX), file.name not in new)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        replace_file(staging / file, target / file)
    if not new:
        (target / INDEX).unlink(missing_ok=True)
    shutil.rmtree(staging)
    _finish_arrival(target)


def _finish_arrival(target: Path) -> None:
    """Remove the shards of which there were two, and that the index in force does not name.

    Where that index is damaged, all stay: they may be what it named.
    """
    arriving, in_force = _arriving(target), _indexed(target)
    if not arriving.exists():
        return
    listed = read_json(arriving, CheckpointError, "remove it")
    if in_force is not None and isinstance(listed, list):
        for name in filter(is_file_name, listed):
            if name.endswith(_SHARD) and name not in in_force:
                (target / name).unlink(missing_ok=True)
    sync(target)
    arriving.unlink()


def _arriving(target: Path) -> Path:
    return target / f".{target.name}{_ARRIVING}"


def _rename_shards(staging: Path, target: Path) -> None:
    """Give shards whose names are taken in `target` other ones, and tell the new index."""
    taken = {name: _fresh(name) for name in _indexed(staging) or () if os.path.lexists(target / name)}
    if not taken:
        return
    for name, fresh in taken.items():
        (staging / name).rename(staging / fresh)
    write_index(staging, {key: taken.get(name, name) for key, name in read_index(staging).items()})


def _fresh(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{secrets.token_hex(3)}.{suffix}"


def _indexed(directory: Path) -> set[str] | None:
    """Names of the files of `directory` that its index names, none without an index; None where it is damaged."""
    if not (directory / INDEX).exists():
        return set()
    try:
        return set(read_index(directory).values())
    except CheckpointError:
        return None


def _files(directory: Path) -> list[Path]:
    return [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
