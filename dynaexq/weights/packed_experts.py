"""Load a packed checkpoint: base blocks are read into their places, upgrades stay on disk until wanted."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dynaexq.checkpoint import PackedReader, PackedShape, PackedStore
from dynaexq.memory import HostStore, RamStore, allocate_bytes
from dynaexq.quantization import ROW_BY_ROW, BlockLayout, ExpertCodec, convert, pieces, rebase, tier_layout
from dynaexq.settings import Settings
from dynaexq.types import BITS
from dynaexq.weights.sources import LoadResult

READERS = 4  # a disk answers several readers faster than one, and each checks what it has read
PROGRESS_FROM = 2**31  # bytes of base; below that reading takes a few seconds


def packed_shape(codec: ExpertCodec, layers: tuple[str, ...], num_experts: int) -> PackedShape:
    """What a checkpoint holds whose experts are packed with `codec`; a segment is one part of an upgrade."""
    segments = tuple((part.offset, part.nbytes) for part in codec.upgrade_layout.parts)
    return PackedShape(
        layers, num_experts, codec.base_layout.nbytes, codec.upgrade_layout.nbytes, segments, len(codec.tiers)
    )


class PrefetchedBase:
    """A base slab in host memory that is read while dense weights are still being loaded; on a CPU it stays there."""

    def __init__(self, reader: PackedReader):
        shape = reader.shape
        nbytes = len(shape.layers) * shape.num_experts * shape.base_nbytes
        self.base = allocate_bytes(nbytes, torch.device("cpu")).view(-1, shape.num_experts, shape.base_nbytes)
        self._pool = ThreadPoolExecutor(READERS)
        self._layers = [self._pool.submit(reader.read_base, i, layer) for i, layer in enumerate(self.base)]

    def wait(self, layer: int) -> None:
        """Return once the blocks of `layer` are there; a CheckpointError if they are not what was saved."""
        self._layers[layer].result()
        if layer == len(self._layers) - 1:
            self._pool.shutdown()


class ConvertedStore:
    """Upgrades of another store with their 16-bit parts in another dtype; see `memory.host_store.HostStore`.

    Args:
        stored, wanted: the layouts of an upgrade there and here.
    """

    nbytes = 0

    def __init__(self, store: HostStore, stored: BlockLayout, wanted: BlockLayout):
        self._store, self._stored, self._wanted = store, stored, wanted
        self.close = store.close

    def write(self, first: int, blocks: Tensor) -> None:
        self._store.write(first, blocks)

    def read_into(self, index: int, out: Tensor) -> None:
        block = torch.empty(1, self._stored.nbytes, dtype=torch.uint8)
        self._store.read_into(index, block[0])
        convert(self._stored, self._wanted, block, out[None, : self._wanted.nbytes])

    def page_locked(self, index: int) -> Tensor | None:
        return None


class ArrangedStore:
    """Upgrades of another store, which has them as files do, in the arrangement of `codec`; see `HostStore`."""

    nbytes = 0

    def __init__(self, store: HostStore, codec: ExpertCodec):
        self._store, self._codec = store, codec
        self.close = store.close

    def write(self, first: int, blocks: Tensor) -> None:
        self._store.write(first, self._codec.arranged_by_rows(self._codec.upgrade_layout, blocks))

    def read_into(self, index: int, out: Tensor) -> None:
        self._store.read_into(index, out)
        self._codec.arrange(self._codec.upgrade_layout, out[None, : self._codec.upgrade_layout.nbytes])

    def page_locked(self, index: int) -> Tensor | None:
        return None


class PackedCheckpoint:
    """A packed checkpoint; see `sources.ExpertCheckpoint`.

    Args:
        stored: the codec that its experts were packed with.
    """

    source = None

    def __init__(self, reader: PackedReader, stored: ExpertCodec):
        self._reader, self._stored = reader, stored
        self._prefetched: PrefetchedBase | None = None

    @property
    def base(self) -> Tensor | None:
        """The base slab, where it has been prefetched."""
        return self._prefetched.base if self._prefetched else None

    def prefetch(self) -> None:
        """Begin to read the base slab on threads of its own."""
        self._prefetched = PrefetchedBase(self._reader)

    def loader(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "PackedLoader":
        return PackedLoader(self._reader.select(layers, first_expert, num_experts), self._stored, self._prefetched)


class PackedLoader:
    """Experts of a packed checkpoint.

    Args:
        stored: the codec they were packed with; another one can be placed if `quantization.offered` says so.
        prefetched: what has been reading into the very slab that is to be filled.
    """

    def __init__(self, reader: PackedReader, stored: ExpertCodec, prefetched: PrefetchedBase | None = None):
        self.reader, self.stored, self._prefetched = reader, stored, prefetched

    def place(self, codec: ExpertCodec, base: Tensor, settings: Settings) -> LoadResult:
        """See `sources.ExpertLoader`. A block that does not match its checksum is a CheckpointError."""
        layers = range(len(base))
        quiet = base.numel() < PROGRESS_FROM or None  # None: where there is no terminal
        with (
            tqdm(total=base.numel(), unit="B", unit_scale=True, desc="reading experts", disable=quiet) as progress,
            ThreadPoolExecutor(READERS if base.is_cpu else 1) as pool,
        ):
            for _ in pool.map(lambda layer: self._place_layer(codec, layer, base[layer]), layers):
                progress.update(base[0].numel())
        errors = np.stack([self._errors(tier) for tier in codec.tiers], axis=-1)
        return LoadResult(errors, self._open_store(codec, settings))

    def _place_layer(self, codec: ExpertCodec, layer: int, base: Tensor) -> None:
        self._read_layer(codec, layer, base)
        codec.arrange(codec.base_layout, base)

    def _read_layer(self, codec: ExpertCodec, layer: int, base: Tensor) -> None:
        """Fill `base [E, nbytes]` as files have it."""
        if self._prefetched is not None:
            self._prefetched.wait(layer)
            return
        if codec.base_layout.parts == self.stored.base_layout.parts:
            if base.is_cpu:
                self.reader.read_base(layer, base)
            else:
                base.copy_(self._stored_base(layer))
            return
        stored_base = self._stored_base(layer)
        for expert in range(len(base)):
            upgrade = self._stored_upgrade(layer, expert) if codec.tiers[0] != self.stored.tiers[0] else None
            base[expert : expert + 1].copy_(rebase(self.stored, codec, stored_base[expert : expert + 1], upgrade))

    def _stored_upgrade(self, layer: int, expert: int) -> Tensor:
        upgrade = torch.empty(1, self.stored.upgrade_layout.nbytes, dtype=torch.uint8)
        for segment, (start, length) in enumerate(self.reader.shape.segments):
            self.reader.read_segment(layer, expert, segment, upgrade[0, start : start + length])
        return upgrade

    def _stored_base(self, layer: int) -> Tensor:
        blocks = torch.empty(self.reader.shape.num_experts, self.reader.shape.base_nbytes, dtype=torch.uint8)
        self.reader.read_base(layer, blocks)
        return blocks

    def _errors(self, tier: str) -> np.ndarray:
        """Errors `[L, E]` at `tier`: as measured, or from those at the base, as every bit takes three quarters off."""
        tiers, errors = self.stored.tiers, self.reader.errors
        if tier in tiers:
            return errors[:, :, tiers.index(tier)]
        return errors[:, :, 0] / 4.0 ** (BITS[tier] - BITS[tiers[0]])

    def _open_store(self, codec: ExpertCodec, settings: Settings) -> HostStore:
        slot_nbytes = codec.upgrade_layout.nbytes
        as_stored = tier_layout(
            codec.shape, self.stored.dtype, codec.tiers, settings.group_size, settings.scale_bits
        ).upgrade
        store: HostStore = PackedStore(self.reader, pieces(self.stored, as_stored))
        if as_stored.parts != codec.upgrade_layout.parts:
            store = ConvertedStore(store, as_stored, codec.upgrade_layout)
        if codec.arrangement != ROW_BY_ROW and codec.refine_planes:
            store = ArrangedStore(store, codec)
        if settings.host_copy in ("auto", "disk") or not slot_nbytes:
            return store
        count = self.reader.shape.num_experts * len(self.reader.shape.layers)
        copy = RamStore(count, slot_nbytes, pinned=settings.host_copy == "pinned")
        block = torch.empty(1, slot_nbytes, dtype=torch.uint8)
        for index in range(count):
            store.read_into(index, block[0])
            copy.write(index, block)
        store.close()
        return copy
