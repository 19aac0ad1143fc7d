"""Safetensors files read and written by position: rows of one tensor at a time, nothing mapped, nothing executed.

A file is not trusted: whatever its header claims is checked against its size before a byte is used, so a truncated
file is a sentence and not a dead process. It knows the container, not what the tensors mean.
"""

import json
import math
import os
import weakref
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynaexq.errors import CheckpointError
from dynaexq.safeguards.durable_files import replacing
from dynaexq.safeguards.outside_files import MOST_TEXT, open_regular, parse_json
from dynaexq.safeguards.system_files import read_at, reserve, write_at

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHECKSUMS = "dynaexq_checksums"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_DIMENSIONS = 64  # PyTorch's limit
_LARGEST_READ = 2**30  # one call of the system transfers less than 2 GiB


class Entry(NamedTuple):
    """One tensor of a shard and where its bytes lie, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Shard:
    """One safetensors file open for reading, by any number of threads; closed with the last reference to it.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._file = open_regular(self.path, CheckpointError, "the checkpoint is incomplete, fetch it again")
        self.close = weakref.finalize(self, os.close, self._file)
        self.entries, self.metadata = _parse(self.path, self._file)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` (exclusive) of tensor `name`, in memory of their own."""
        entry = self.entries[name]
        shape = entry.shape if not entry.shape else (len(range(entry.shape[0])[first:last]), *entry.shape[1:])
        out = torch.empty(shape, dtype=entry.dtype, device="cpu")
        self.read_into(entry.offset + first * entry.row_nbytes, out.view(-1).view(torch.uint8))
        return out

    def read_into(self, offset: int, out: Tensor) -> None:
        """Fill contiguous uint8 host tensor `out` with the bytes at `offset`."""
        buffer = out.numpy().data
        while buffer:
            try:
                count = read_at(self._file, buffer[:_LARGEST_READ], offset)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error}") from error
            if not count:
                raise CheckpointError(f"{self.path} ends at byte {offset}: it was truncated; fetch it again")
            buffer, offset = buffer[count:], offset + count


class ShardWriter:
    """Write a safetensors file whose tensors are known beforehand and whose rows arrive in any order.

    The disk space is reserved at once; the file is complete after `close`.

    Raises:
        CheckpointError: there is not enough space, here or in `write`.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ):
        self.path = path
        header, offset = {"__metadata__": dict(metadata)}, 0
        relative: dict[str, Entry] = {}
        for name, (dtype, shape) in tensors.items():
            relative[name] = entry = Entry(dtype, shape, offset)
            end = offset + entry.nbytes
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.entries = {name: entry._replace(offset=start + entry.offset) for name, entry in relative.items()}
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        try:
            reserve(self._file.fileno(), start + offset)
            self._write(0, len(text).to_bytes(8, "little") + text)
        except OSError as error:
            self._file.close()
            raise _no_space(path, start + offset, error) from error

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Put `rows` at row `first` of tensor `name`."""
        entry = self.entries[name]
        content = rows.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        try:
            self._write(entry.offset + first * entry.row_nbytes, content)
        except OSError as error:
            raise _no_space(self.path, len(content), error) from error

    def close(self) -> None:
        """Sync the file to disk, then close it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, offset: int, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:
            count = write_at(self._file.fileno(), view[:_LARGEST_READ], offset)
            view, offset = view[count:], offset + count


def _read(file: int, nbytes: int, offset: int) -> bytes:
    content = bytearray(nbytes)
    return bytes(content[: read_at(file, memoryview(content), offset)])


def _parse(path: Path, file: int) -> tuple[dict[str, Entry], dict[str, str]]:
    size = os.fstat(file).st_size
    length = int.from_bytes(_read(file, 8, 0), "little")
    if not 2 <= length <= min(MOST_TEXT, size - 8):
        raise CheckpointError(
            f"{path} is not a safetensors file, or was truncated to {size:,} bytes; pickles are never opened: "
            "convert the checkpoint with safetensors, or fetch it again"
        )
    try:
        header = parse_json(_read(file, length, 8))
        metadata = {name: text for name, text in header.pop("__metadata__", {}).items() if isinstance(text, str)}
        entries, ends = {}, {}
        for name, fields in header.items():
            begin, end = map(_index, fields["data_offsets"])
            entries[name] = Entry(DTYPES[fields["dtype"]], _shape(fields["shape"], size), 8 + length + begin)
            ends[name] = 8 + length + end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error)[:200]
        raise CheckpointError(f"{path}: its safetensors header cannot be read ({problem}); fetch it again") from error
    for name, entry in entries.items():
        if entry.offset + entry.nbytes != ends[name]:
            raise CheckpointError(f"{path}: the header lies about the size of {name}; fetch the file again")
        if ends[name] > size:
            raise CheckpointError(
                f"{path} was truncated: {name} ends at byte {ends[name]:,} and the file at {size:,}; fetch it again"
            )
    return entries, metadata


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, got {str(value)[:20]}")
    return value


def _shape(dimensions: Any, size: int) -> tuple[int, ...]:
    """The shape of a tensor in a file of `size` bytes; without multiplying what no such file can hold."""
    if not isinstance(dimensions, list) or len(dimensions) > _MOST_DIMENSIONS:
        raise ValueError(f"expected a list of at most {_MOST_DIMENSIONS} dimensions")
    shape = tuple(map(_index, dimensions))
    count = 1
    for dimension in shape:
        count = min(count * dimension, size + 1) if 0 not in shape else 0
    if count > size or max(shape, default=0) > 2**62:
        raise ValueError("a tensor of more elements than the file has bytes")
    return shape


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Put a safetensors file with a checksum of every tensor in the place of `path`.

    Raises:
        CheckpointError: there is not enough space, or the place cannot be written to.
    """
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path, CheckpointError) as staging:
        writer = ShardWriter(staging, shapes, {**metadata, _CHECKSUMS: json.dumps(sums)})
        try:
            for name, tensor in tensors.items():
                writer.write(name, 0, tensor)
        finally:
            writer.close()


def read_tensors(
    path: Path, kind: Collection[str], names: Collection[str], optional: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors `names` and the metadata of a file of one of `kind`, compared with their checksums if it has any.

    Args:
        optional: tensors that it may have as well.

    Raises:
        CheckpointError: it is of another kind, lacks a tensor, or is damaged.
    """
    shard = Shard(path)
    try:
        if shard.metadata.get("kind") not in kind or not shard.entries.keys() >= set(names):
            raise CheckpointError(f"{path} is no {next(iter(kind))}, but some other safetensors file")
        names = [*names, *(name for name in optional if name in shard.entries)]
        tensors = {name: shard.read(name) for name in names}
    finally:
        shard.close()
    try:
        sums = parse_json(shard.metadata.get(_CHECKSUMS, "{}"))
        damaged = [name for name in names if sums and sums.get(name) != checksum(tensors[name])]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its checksums cannot be read") from error
    if damaged:
        raise CheckpointError(f"{path}: {damaged[0]} does not match its checksum; the file is damaged")
    return tensors, shard.metadata


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)


def _no_space(path: Path, nbytes: int, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {nbytes:,} bytes to {path}: {error}; free some space or write elsewhere")
