"""Experts read back from where they lie: as blocks, to be saved; in their own dtype, to undo a patch."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaexq.formats import ExpertCodec, ExpertWeights
from dynaexq.memory import HostStore


class PackedExpert(NamedTuple):
    """One expert as it is saved: uint8 `[1, nbytes]` base, upgrade or None, and its errors `[1, tiers]`."""

    base: Tensor
    upgrade: Tensor | None
    errors: np.ndarray


def packed_experts(
    codec: ExpertCodec, base: Tensor, errors: np.ndarray, store: HostStore, first: int
) -> Iterator[PackedExpert]:
    """One layer's experts in turn.

    Args:
        base, errors: of the layer, `[E, nbytes]` and `[E, tiers]`.
        first: index of the layer's first expert in `store`.

    Raises:
        StoreError: an upgrade cannot be read.
    """
    upgrade = torch.zeros(1, codec.upgrade_layout.nbytes, dtype=torch.uint8)
    for expert in range(len(base)):
        if upgrade.numel():
            store.read_into(first + expert, upgrade[0])
        rows = slice(expert, expert + 1)
        yield PackedExpert(base[rows].cpu(), upgrade if upgrade.numel() else None, errors[rows])


def source_experts(codec: ExpertCodec, base: Tensor, store: HostStore | None, first: int) -> ExpertWeights | None:
    """One layer's experts in the model's own dtype; None where neither their base nor `store` keeps it."""
    if not codec.planes:
        return codec.decode(base, None, codec.dtype)
    if not codec.replaces or store is None:
        return None
    blocks = torch.empty(len(base), codec.upgrade_layout.nbytes, dtype=torch.uint8)
    for expert, block in enumerate(blocks):
        store.read_into(first + expert, block)
    return codec.decode(base, blocks, codec.dtype)
