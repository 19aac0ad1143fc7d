"""Packed experts on disk: base blocks, upgrade blocks, error figures and checksums, layer by layer, in shards.

For a layer whose experts are at path P, `experts-base-*.safetensors` holds

    P.packed.base        uint8   [E, base_nbytes]
    P.packed.errors      float64 [E, tiers]            relative squared error of the weights at each tier
    P.packed.checksums   int64   [E, 1 + segments]     CRC-32 of the base block and of each segment of the upgrade
    P.packed.errors_checksums  int64 [E]               CRC-32 of each row of errors; absent in files of before 0.2

and `experts-upgrade-*.safetensors` holds `P.packed.upgrade`, uint8 `[E, upgrade_nbytes]`. A segment is a run of
bytes of an upgrade that may be read without the others. What the bytes mean is not known here.
"""

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynaexq.checkpoint.safetensors_io import Entry, Shard, ShardWriter, checksum
from dynaexq.errors import CheckpointError, StoreError

FORMAT_VERSION = 3
READ_VERSIONS = (1, 2, FORMAT_VERSION)
"""In the first, scales and minima are float16; in the first two there are neither int3 nor int6, and packed heads are
int8."""

QUANT_METHOD = "dynaexq"
"""What config.json calls checkpoints of ours."""

MARK = ".packed."
_UNFINISHED = ".unfinished"

Segment = tuple[int, int]
"""Offset and length in bytes."""


@dataclass(frozen=True)
class PackedShape:
    """The contents of a packed checkpoint: names of the layers, experts per layer, bytes of their blocks."""

    layers: tuple[str, ...]
    num_experts: int
    base_nbytes: int
    upgrade_nbytes: int
    segments: tuple[Segment, ...]
    num_tiers: int

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return len(self.layers) * self.num_experts * (self.base_nbytes + self.upgrade_nbytes)

    def base_tensors(self, layer: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            f"{layer}{MARK}errors": (torch.float64, (self.num_experts, self.num_tiers)),
            f"{layer}{MARK}checksums": (torch.int64, (self.num_experts, 1 + len(self.segments))),
            f"{layer}{MARK}errors_checksums": (torch.int64, (self.num_experts,)),
            f"{layer}{MARK}base": (torch.uint8, (self.num_experts, self.base_nbytes)),
        }

    def upgrade_tensors(self, layer: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if not self.upgrade_nbytes:
            return {}
        return {f"{layer}{MARK}upgrade": (torch.uint8, (self.num_experts, self.upgrade_nbytes))}

    def checksums(self, base: Tensor, upgrade: Tensor | None) -> list[int]:
        """Checksums of one expert's blocks, as its row of `checksums`."""
        sums = [zlib.crc32(base.numpy().data)]
        if upgrade is not None:
            sums += [zlib.crc32(upgrade[start : start + length].numpy().data) for start, length in self.segments]
        return sums


class PackedWriter:
    """Write packed experts into `directory`, a few at a time, layers in order.

    A shard bears its final name only once it is complete. A writer that finds complete shards in the directory goes
    on behind them: `first_layer` is the first that is missing.
    """

    def __init__(self, directory: Path, shape: PackedShape, max_shard_size: int, metadata: Mapping[str, str]):
        self.directory, self.shape, self._metadata = directory, shape, metadata
        per_layer = shape.num_experts * max(shape.base_nbytes, shape.upgrade_nbytes)
        at_once = max(1, max_shard_size // per_layer)
        self._groups = [shape.layers[i : i + at_once] for i in range(0, len(shape.layers), at_once)]
        self._writers: list[ShardWriter] = []
        done = 0
        while done < len(self._groups) and all(path.exists() for path in self._paths(done)):
            done += 1
        self._group = done
        self.first_layer = sum(map(len, self._groups[:done]))

    def write(self, layer: int, first: int, base: Tensor, upgrade: Tensor | None, errors: np.ndarray) -> None:
        """Put n experts: uint8 `base [n, base_nbytes]`, `upgrade [n, upgrade_nbytes]` or None, `errors [n, tiers]`."""
        name = self.shape.layers[layer]
        self._open_group_of(name)
        base, upgrade = base.cpu(), None if upgrade is None else upgrade.cpu()
        sums = [self.shape.checksums(block, None if upgrade is None else upgrade[i]) for i, block in enumerate(base)]
        head, *tail = self._writers
        head.write(f"{name}{MARK}base", first, base)
        rows = torch.as_tensor(np.ascontiguousarray(errors))
        head.write(f"{name}{MARK}errors", first, rows)
        head.write(f"{name}{MARK}errors_checksums", first, torch.tensor([checksum(row) for row in rows]))
        head.write(f"{name}{MARK}checksums", first, torch.tensor(sums, dtype=torch.int64))
        if upgrade is not None:
            tail[0].write(f"{name}{MARK}upgrade", first, upgrade)

    def finish(self) -> dict[str, str]:
        """Complete the last shard; returns the file of every tensor, as an index lists them."""
        self._close_group()
        assert self._group == len(self._groups), "every layer is written before the end"
        return {
            tensor: path.name
            for number, group in enumerate(self._groups)
            for path, tensors in zip(self._paths(number), self._tensors(group), strict=True)
            for tensor in tensors
        }

    def abandon(self) -> None:
        """Remove what is not complete."""
        for writer in self._writers:
            writer.abandon()
        self._writers = []

    def _open_group_of(self, layer: str) -> None:
        if self._writers and layer not in self._groups[self._group]:
            self._close_group()
        if self._writers:
            return
        assert layer in self._groups[self._group], "layers are written in order"
        for path, tensors in zip(self._paths(self._group), self._tensors(self._groups[self._group]), strict=True):
            self._writers.append(ShardWriter(path.with_name(path.name + _UNFINISHED), tensors, self._metadata))

    def _close_group(self) -> None:
        if not self._writers:
            return
        for writer in self._writers:
            writer.close()
        for writer in self._writers:
            writer.path.rename(writer.path.with_name(writer.path.name.removesuffix(_UNFINISHED)))
        self._writers = []
        self._group += 1

    def _tensors(self, group: Sequence[str]) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        parts = [self.shape.base_tensors] + ([self.shape.upgrade_tensors] if self.shape.upgrade_nbytes else [])
        return [{name: array for layer in group for name, array in part(layer).items()} for part in parts]

    def _paths(self, group: int) -> list[Path]:
        kinds = ("base", "upgrade") if self.shape.upgrade_nbytes else ("base",)
        suffix = f"{group + 1:05d}-of-{len(self._groups):05d}.safetensors"
        return [self.directory / f"experts-{kind}-{suffix}" for kind in kinds]


class PackedReader:
    """The packed experts of a checkpoint, checked against the `shape` they are expected to have.

    Args:
        shards: the checkpoint's files; those without packed experts are left alone.

    Raises:
        CheckpointError: a tensor is missing, or of another shape than the model and its configuration ask for.
    """

    def __init__(self, shards: Sequence[Shard], shape: PackedShape):
        self.shape = shape
        self.first_expert = 0
        self._at: dict[str, tuple[Shard, Entry]] = {
            name: (shard, entry) for shard in shards for name, entry in shard.entries.items() if MARK in name
        }
        for layer in shape.layers:
            for name, (dtype, dimensions) in (shape.base_tensors(layer) | shape.upgrade_tensors(layer)).items():
                if name in self._at or not name.endswith("errors_checksums"):
                    self._check(name, dtype, dimensions)
        self.errors = np.stack([self._errors(layer) for layer in shape.layers])
        self._checksums = np.stack([self._small(layer, "checksums") for layer in shape.layers])

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "PackedReader":
        """The same files for some of the layers and a run of their experts only, both counted from 0 there."""
        part, experts = copy.copy(self), slice(first_expert, first_expert + num_experts)
        part.shape = replace(self.shape, layers=tuple(self.shape.layers[i] for i in layers), num_experts=num_experts)
        part.errors, part._checksums = self.errors[list(layers), experts], self._checksums[list(layers), experts]
        part.first_expert = first_expert
        return part

    def read_base(self, layer: int, out: Tensor) -> None:
        """Fill host tensor `out [E, base_nbytes]` with a layer's base blocks; CheckpointError if one is damaged."""
        shard, entry = self._at[f"{self.shape.layers[layer]}{MARK}base"]
        for expert, block in enumerate(out):  # one by one, so that a block is checked while it is in cache
            shard.read_into(entry.offset + (self.first_expert + expert) * entry.row_nbytes, block)
            if zlib.crc32(block.numpy().data) != self._checksums[layer, expert, 0]:
                raise CheckpointError(
                    f"{shard.path}: the base of expert {expert} in {self.shape.layers[layer]} does not match its "
                    "checksum; the file is damaged, fetch it again"
                )

    def read_segment(self, layer: int, expert: int, segment: int, out: Tensor) -> None:
        """Fill uint8 host tensor `out` with one segment of an upgrade; a StoreError if its checksum does not match."""
        shard, entry = self._at[f"{self.shape.layers[layer]}{MARK}upgrade"]
        start, _ = self.shape.segments[segment]
        try:
            shard.read_into(entry.offset + (self.first_expert + expert) * entry.row_nbytes + start, out)
        except CheckpointError as error:
            raise StoreError(str(error)) from error
        if zlib.crc32(out.numpy().data) != self._checksums[layer, expert, 1 + segment]:
            raise StoreError(
                f"{shard.path}: the upgrade of expert {expert} in {self.shape.layers[layer]} does not match its "
                "checksum"
            )

    def close(self) -> None:
        for shard in {id(shard): shard for shard, _ in self._at.values()}.values():
            shard.close()

    def _check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if name not in self._at:
            raise CheckpointError(f"the checkpoint lacks {name}: a shard is missing or unfinished; fetch it again")
        shard, entry = self._at[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise CheckpointError(
                f"{shard.path}: expected {name} to be {dtype} {list(shape)} from config.json, found {entry.dtype} "
                f"{list(entry.shape)}; the configuration and the weights do not belong together"
            )

    def _errors(self, layer: str) -> np.ndarray:
        """Error figures of a layer; a CheckpointError where they are damaged, or no figures."""
        shard, _ = self._at[f"{layer}{MARK}errors"]
        errors = self._small(layer, "errors")
        sums = [checksum(torch.from_numpy(row)) for row in errors]
        known = f"{layer}{MARK}errors_checksums" in self._at
        if known and sums != self._small(layer, "errors_checksums").tolist():
            raise CheckpointError(
                f"{shard.path}: the error figures of {layer} do not match their checksums; the file is damaged, fetch "
                "it again"
            )
        if not (np.isfinite(errors) & (errors >= 0)).all():
            raise CheckpointError(
                f"{shard.path}: expected errors of {layer} that are finite and not negative; the file is damaged, "
                "fetch it again"
            )
        return errors

    def _small(self, layer: str, part: str) -> np.ndarray:
        shard, _ = self._at[f"{layer}{MARK}{part}"]
        return shard.read(f"{layer}{MARK}{part}").numpy()


class PackedStore:
    """The upgrades of a packed checkpoint, read from its files when they are wanted; see `memory.host.HostStore`.

    Args:
        pieces: (segment of the stored upgrade, offset in the slot), for each part that a slot holds.
    """

    def __init__(self, reader: PackedReader, pieces: Sequence[tuple[int, int]]):
        self._reader, self._pieces = reader, pieces

    def write(self, first: int, blocks: Tensor) -> None:
        raise StoreError("a packed checkpoint is read where it is and never written")

    def read_into(self, index: int, out: Tensor) -> None:
        layer, expert = divmod(index, self._reader.shape.num_experts)
        for segment, offset in self._pieces:
            length = self._reader.shape.segments[segment][1]
            self._reader.read_segment(layer, expert, segment, out[offset : offset + length])

    def page_locked(self, index: int) -> Tensor | None:
        return None

    @property
    def nbytes(self) -> int:
        return 0

    def close(self) -> None:
        self._reader.close()
