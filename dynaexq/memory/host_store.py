"""Where upgrade bytes wait until they are wanted: in host memory, page-locked, or on disk.

One expert's upgrade is one contiguous run of bytes, addressed by a flat index; a store does not know what it means.
"""

import tempfile
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from dynaexq.errors import StoreError
from dynaexq.memory.pinned import PageLocked
from dynaexq.memory.slab_pool import allocate_bytes
from dynaexq.safeguards.system_files import read_at, reserve, write_at


class HostStore(Protocol):
    """Upgrade bytes of `count` experts, `slot_nbytes` each."""

    def write(self, first: int, blocks: Tensor) -> None:
        """Keep uint8 `blocks [n, slot_nbytes]` as the bytes of experts `first` to `first + n`."""

    def read_into(self, index: int, out: Tensor) -> None:
        """Fill uint8 host tensor `out [slot_nbytes]`. Raises StoreError; `out` is then undefined."""

    def page_locked(self, index: int) -> Tensor | None:
        """The bytes themselves where a device can fetch them without staging, else None."""

    @property
    def nbytes(self) -> int:
        """Host memory taken, in bytes."""

    def close(self) -> None:
        """Free memory and close files."""


class RamStore:
    """In host memory; `pinned` page-locks it, so that copies to a GPU need no staging."""

    def __init__(self, count: int, slot_nbytes: int, pinned: bool = False):
        nbytes = count * slot_nbytes
        self._locked = PageLocked(nbytes) if pinned else None
        memory = self._locked.bytes if self._locked else allocate_bytes(nbytes, torch.device("cpu"))
        self._blocks: Any = memory.view(count, slot_nbytes)

    def write(self, first: int, blocks: Tensor) -> None:
        self._blocks[first : first + len(blocks)].copy_(blocks)

    def read_into(self, index: int, out: Tensor) -> None:
        out.copy_(self._blocks[index])

    def page_locked(self, index: int) -> Tensor | None:
        return self._blocks[index] if self._locked else None

    @property
    def nbytes(self) -> int:
        return 0 if self._blocks is None else self._blocks.numel()

    def close(self) -> None:
        self._blocks = None  # and no call of torch: a forgotten store may be collected while a model is traced
        if self._locked:
            self._locked.close()
            self._locked = None


class DiskStore:
    """In an unnamed temporary file, read by position: a truncated file is a failed move and not a dead process.

    Each block has a CRC-32, so that what a disk has damaged is a failed move as well.
    """

    def __init__(self, count: int, slot_nbytes: int, directory: Path | None = None):
        self._slot_nbytes = slot_nbytes
        self._sums: dict[int, int] = {}
        try:
            self._file = _reserve(max(1, count * slot_nbytes), directory)
        except OSError as error:
            raise StoreError(
                f"cannot reserve {count * slot_nbytes:,} bytes of disk for upgrades: {error}; "
                'free some space, point TMPDIR elsewhere, or use host_copy="ram"'
            ) from error

    def write(self, first: int, blocks: Tensor) -> None:
        for index, block in enumerate(blocks.cpu(), first):  # one by one: a single write stops short of 2 GiB
            try:
                count = write_at(self._file.fileno(), block.numpy().data, index * self._slot_nbytes)
            except OSError as error:
                raise StoreError(f"cannot write the upgrade of expert {index}: {error}") from error
            if count != self._slot_nbytes:
                raise StoreError(f"wrote {count} of {self._slot_nbytes} bytes of expert {index}: is the disk full?")
            self._sums[index] = zlib.crc32(block.numpy().data)

    def read_into(self, index: int, out: Tensor) -> None:
        try:
            count = read_at(self._file.fileno(), out.numpy().data, index * self._slot_nbytes)
        except OSError as error:
            raise StoreError(f"cannot read the upgrade of expert {index}: {error}") from error
        if count != self._slot_nbytes:
            raise StoreError(f"read {count} of {self._slot_nbytes} bytes of expert {index}: the file was truncated")
        if self._sums.get(index) != zlib.crc32(out.numpy().data):
            raise StoreError(f"the upgrade of expert {index} does not match its checksum: the disk has damaged it")

    def page_locked(self, index: int) -> Tensor | None:
        return None

    @property
    def nbytes(self) -> int:
        return 0

    def close(self) -> None:
        self._file.close()


def _reserve(nbytes: int, directory: Path | None) -> IO[bytes]:
    file = tempfile.TemporaryFile(dir=directory, prefix="dynaexq-")  # noqa: SIM115 - closed by the store
    try:
        reserve(file.fileno(), nbytes)
    except OSError:
        file.close()
        raise
    return file
