"""Read experts back: as blocks, to be saved; in their own dtype, to undo a patch."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaexq.errors import ClosedError
from dynaexq.memory import HostStore
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.weights.quantize_experts import SourceStore


class PackedExpert(NamedTuple):
    """One expert as it is saved.

    Of a tiny int2 + int4 model: `base [1, 2560]`, `upgrade [1, 2048]`, errors [[0.09, 0.006]].

    Attributes:
        base: uint8 `[1, nbytes]`.
        upgrade: uint8 `[1, nbytes]`, or None for a single tier.
        errors: float64 `[1, tiers]`.
    """

    base: Tensor
    upgrade: Tensor | None
    errors: np.ndarray


class StoredExperts:
    """All experts of one runtime.

    Args:
        base: uint8 `[L, E, nbytes]` on the device.
        errors: `[L, E, tiers]`.
        store: where the upgrades are; None once that was closed.
    """

    def __init__(self, codec: ExpertCodec, base: Tensor, errors: np.ndarray, store: HostStore | None):
        self.codec, self.base, self.errors, self._store = codec, base, errors, store

    @property
    def keeps_source(self) -> bool:
        """Whether upgrades are read from the source weights themselves, so that these must not be freed."""
        return isinstance(self._store, SourceStore)

    def packed(self, layer: int) -> Iterator[PackedExpert]:
        """One layer's experts in turn, as files have them.

        Raises:
            ClosedError: the store was closed.
            StoreError: an upgrade cannot be read.
        """
        if self._store is None:
            raise ClosedError("the runtime was closed and its upgrades are gone; save the model before closing it")
        upgrade = torch.zeros(1, self.codec.upgrade_layout.nbytes, dtype=torch.uint8)
        for expert, block in enumerate(self.base[layer]):
            if upgrade.numel():
                self._store.read_into(self._index(layer, expert), upgrade[0])
            errors = self.errors[layer, expert][None]
            base = self.codec.arranged_by_rows(self.codec.base_layout, block[None].cpu())
            planes = self.codec.arranged_by_rows(self.codec.upgrade_layout, upgrade) if upgrade.numel() else None
            yield PackedExpert(base, planes, errors)

    def source(self, layer: int) -> ExpertWeights | None:
        """One layer's experts in the model's own dtype, bit for bit as given; None where no tier keeps them."""
        base, codec = self.base[layer], self.codec
        if not codec.planes:
            return codec.decode(base, None, codec.dtype)
        if not codec.replaces or self._store is None:
            return None
        blocks = torch.empty(len(base), codec.upgrade_layout.nbytes, dtype=torch.uint8)
        for expert, block in enumerate(blocks):
            self._store.read_into(self._index(layer, expert), block)
        return codec.decode(base, blocks, codec.dtype)

    def _index(self, layer: int, expert: int) -> int:
        return layer * self.base.shape[1] + expert
