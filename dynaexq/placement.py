"""From source weights to packed blocks in their places, a few experts at a time. It decides and frees nothing."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaexq.formats import ExpertCodec, ExpertWeights, check_representable
from dynaexq.memory import DiskStore, HostStore, RamStore, SourceStore
from dynaexq.settings import Settings

WEIGHTS_AT_ONCE = 2**22  # quantised together; the quantiser works on some ten float32 copies of them
PROGRESS_FROM = 2**28  # weights; below that quantising takes a few seconds


class ExpertSource(Protocol):
    """Where the 16-bit experts come from."""

    num_layers: int
    num_experts: int

    def name(self, layer: int) -> str:
        """What to call a layer's experts in an error message."""

    def read(self, layer: int, first: int, last: int) -> ExpertWeights:
        """Weights of experts `first` to `last` (exclusive), as the source stores them."""


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all `tensors` together; those that share their memory, as tied weights do, count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def check_source(source: ExpertSource) -> None:
    """Raise a QuantizationError naming the tensor and the expert if a weight cannot be coded."""
    for layer in range(source.num_layers):
        weights = source.read(layer, 0, source.num_experts)
        check_representable(weights.up, f"{source.name(layer)}, first matrix")
        check_representable(weights.down, f"{source.name(layer)}, second matrix")


def open_store(codec: ExpertCodec, source: ExpertSource, settings: Settings) -> HostStore:
    """The store that `settings.host_copy` asks for, empty; or the source itself where it holds the very bytes."""
    in_host_memory = source.read(0, 0, 1).up.device.type == "cpu"
    if settings.host_copy == "ram" and codec.replaces and in_host_memory:
        return SourceStore([_parts(codec, source, layer) for layer in range(source.num_layers)], source.num_experts)
    count = source.num_layers * source.num_experts
    if settings.host_copy == "disk":
        return DiskStore(count, codec.upgrade_layout.nbytes)
    return RamStore(count, codec.upgrade_layout.nbytes, pinned=settings.host_copy == "pinned")


def place(source: ExpertSource, codec: ExpertCodec, base: Tensor, store: HostStore) -> np.ndarray:
    """Encode every expert: base blocks into `base [L, E, nbytes]`, upgrades into `store`.

    Returns:
        Relative squared errors `[L, E, tiers]`, as `Encoded.errors`.
    """
    num_layers, num_experts = source.num_layers, source.num_experts
    total = num_layers * num_experts
    at_once = max(1, WEIGHTS_AT_ONCE // codec.shape.num_weights)
    errors = np.zeros((num_layers, num_experts, len(codec.tiers)))
    quiet = total * codec.shape.num_weights < PROGRESS_FROM
    with tqdm(total=total, unit="expert", desc="quantising", disable=quiet) as progress, torch.no_grad():
        for layer in range(num_layers):
            for first in range(0, num_experts, at_once):
                last = min(first + at_once, num_experts)
                encoded = codec.encode(source.read(layer, first, last).map(lambda part: part.to(base.device)))
                base[layer, first:last].copy_(encoded.base)
                errors[layer, first:last] = encoded.errors
                if encoded.upgrade is not None and not isinstance(store, SourceStore):
                    store.write(layer * num_experts + first, encoded.upgrade)
                progress.update(last - first)
    return errors


def _parts(codec: ExpertCodec, source: ExpertSource, layer: int) -> list[tuple[int, Tensor]]:
    weights = source.read(layer, 0, source.num_experts)
    tensors = {"up.weight": weights.up, "down.weight": weights.down}
    if weights.up_bias is not None and weights.down_bias is not None:
        tensors |= {"up.bias": weights.up_bias, "down.bias": weights.down_bias}
    return [(part.offset, tensors[part.name]) for part in codec.upgrade_layout.parts]
