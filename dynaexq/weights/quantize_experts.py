"""Quantize 16-bit experts into their places, a few at a time. It decides and frees nothing."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dynaexq.errors import StoreError
from dynaexq.memory import DiskStore, HostStore, RamStore
from dynaexq.quantization import Encoded, ExpertCodec, check_representable
from dynaexq.settings import Settings
from dynaexq.weights.calibration import Calibration
from dynaexq.weights.sources import ExpertSource, LoadResult, SelectableSource

logger = logging.getLogger(__name__)

WEIGHTS_AT_ONCE = {False: 2**22, True: 2**25}
"""Read and coded together, without a calibration and with one, whose steps go through columns one after the other."""

PROGRESS_FROM = 2**28  # weights; below that quantizing takes a few seconds


class QuantizingLoader:
    """Experts quantized from their 16-bit weights.

    Args:
        calibration: of their inputs, layer by layer and expert by expert as in `source`, where they are known.
    """

    def __init__(self, source: ExpertSource, calibration: Calibration | None = None):
        self.source, self.calibration = source, calibration

    def place(self, codec: ExpertCodec, base: Tensor, settings: Settings) -> LoadResult:
        """See `ExpertLoader`. A weight that no code represents is a QuantizationError."""
        source = self.source
        store = self._open_store(codec, settings)
        errors = np.zeros((source.num_layers, source.num_experts, len(codec.tiers)))
        try:
            for layer, first, encoded in encode_all(source, codec, base.device, calibration=self.calibration):
                last = first + len(encoded.base)
                base[layer, first:last].copy_(encoded.base)
                errors[layer, first:last] = encoded.errors
                if encoded.upgrade is not None and not isinstance(store, SourceStore):
                    store.write(layer * source.num_experts + first, encoded.upgrade)
        except BaseException:
            store.close()
            raise
        return LoadResult(errors, store)

    def _open_store(self, codec: ExpertCodec, settings: Settings) -> HostStore:
        """The store that `settings.host_copy` asks for, empty; or the source itself where it holds the very bytes."""
        source, host_copy = self.source, settings.host_copy
        where_source_is = ("auto", "ram") if source.host_nbytes else ("auto", "disk")
        if codec.replaces and source.is_lasting and host_copy in where_source_is:
            return SourceStore(source, codec)
        return open_store(source.num_layers * source.num_experts, codec.upgrade_layout.nbytes, host_copy)


class SixteenBitCheckpoint:
    """A checkpoint with 16-bit experts; see `sources.ExpertCheckpoint`.

    Args:
        calibration: of the inputs of all its experts, where they are known.
    """

    base = None

    def __init__(self, source: SelectableSource, calibration: Calibration | None):
        self.source, self._calibration = source, calibration

    def prefetch(self) -> None:
        """Nothing: the base has yet to be quantized."""

    def loader(self, layers: Sequence[int], first_expert: int, num_experts: int) -> QuantizingLoader:
        part = layers, first_expert, num_experts
        return QuantizingLoader(self.source.select(*part), self._calibration and self._calibration.select(*part))


class SourceStore:
    """16-bit upgrades taken from the source weights themselves; see `memory.host.HostStore`."""

    def __init__(self, source: ExpertSource, codec: ExpertCodec):
        self._source: ExpertSource | None = source
        self._codec = codec

    def write(self, first: int, blocks: Tensor) -> None:
        raise StoreError("the source weights are read where they are and never written")

    def read_into(self, index: int, out: Tensor) -> None:
        if self._source is None:
            raise StoreError("the store was closed")
        layer, expert = divmod(index, self._source.num_experts)
        try:
            weights = self._source.read(layer, expert, expert + 1)
        except OSError as error:
            raise StoreError(f"cannot read the upgrade of expert {expert}: {error}") from error
        self._codec.write_dense(out[None], weights)

    def page_locked(self, index: int) -> Tensor | None:
        return None

    @property
    def nbytes(self) -> int:
        return 0 if self._source is None else self._source.host_nbytes

    def close(self) -> None:
        self._source = None


def open_store(count: int, slot_nbytes: int, host_copy: str) -> HostStore:
    """Open an empty store for `count` upgrades; in RAM, with a warning, where the disk is full."""
    if host_copy == "disk":
        try:
            return DiskStore(count, slot_nbytes)
        except StoreError as error:
            logger.warning("%s; the upgrades wait in RAM instead", error)
    return RamStore(count, slot_nbytes, pinned=host_copy == "pinned")


def encode_all(
    source: ExpertSource,
    codec: ExpertCodec,
    device: torch.device,
    first_layer: int = 0,
    calibration: Calibration | None = None,
) -> Iterator[tuple[int, int, Encoded]]:
    """Encode the experts of `source` on `device`, from `first_layer` on: (layer, first expert, n experts as bytes).

    Shows progress in source bytes once that takes more than a few seconds.

    Raises:
        QuantizationError: names the tensor and the expert whose weight cannot be coded.
    """
    num_layers, num_experts = source.num_layers - first_layer, source.num_experts
    at_once = max(1, WEIGHTS_AT_ONCE[calibration is not None] // codec.shape.num_weights)
    expert_nbytes = codec.shape.num_weights * codec.dtype.itemsize
    quiet = num_layers * num_experts * codec.shape.num_weights < PROGRESS_FROM or None
    total = num_layers * num_experts * expert_nbytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="quantizing", disable=quiet) as progress, torch.no_grad():
        for layer in range(first_layer, source.num_layers):
            for first in range(0, num_experts, at_once):
                weights = source.read(layer, first, min(first + at_once, num_experts))
                if codec.planes:
                    check_representable(weights.up, f"{source.name(layer)}, first matrix", first)
                    check_representable(weights.down, f"{source.name(layer)}, second matrix", first)
                here = weights.map(lambda part: part.to(device))
                known = None if calibration is None else [*calibration.of_experts(layer, first, here, codec.shape)]
                yield layer, first, codec.encode(here, known)
                progress.update(len(weights.up) * expert_nbytes)
