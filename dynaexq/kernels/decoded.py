"""The weights of routed experts, decoded a few at a time, and the rows routed to each. It multiplies nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.quantization import ExpertWeights

DECODED_WEIGHTS = 2**22  # weights decoded at a time: 8 MiB in bfloat16, so that they stay in cache until they are used


@dataclass(frozen=True)
class Choices:
    """The choices `[N, k]` of N tokens, sorted by expert.

    Two tokens, of which both chose expert 3 and the second expert 5 as well, the first a foreign one:
    `Choices([3, 5], order=[0, 1, 3], token=[0, 1, 1], sizes=[2, 1])`.

    Attributes:
        experts: those that were chosen and are here, in ascending order.
        order: int64 `[P]`, the pairs of a token and an expert that is here, each `choice * N + token`.
        token: int64 `[P]`, their tokens.
        sizes: pairs of each of `experts`.
    """

    experts: list[int]
    order: Tensor
    token: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> "Choices":
        """Sort ids `[N, k]`; those outside `[0, num_experts)` are left out."""
        # Choice by choice, the row order of Transformers' eager loop; foreign ids sort last.
        ids = top_k_index.T.reshape(-1).long()  # [N k]
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        counts = torch.bincount(ids, minlength=num_experts + 1).tolist()  # [E + 1]
        experts = [expert for expert in range(num_experts) if counts[expert]]
        order = torch.argsort(ids, stable=True)[: len(ids) - counts[-1]]  # [P]
        return cls(experts, order, order % max(1, len(top_k_index)), [counts[expert] for expert in experts])


def decoded(
    experts: list[int], layer: ExpertLayer, upgrades: Upgrades, dtype: torch.dtype
) -> Iterator[tuple[list[int], ExpertWeights]]:
    """These experts and their weights, in groups that are decoded together."""
    at_once = max(1, DECODED_WEIGHTS // layer.codec.shape.num_weights)
    planes = {expert: upgrades.of(expert) for expert in experts}
    base_only = [expert for expert in experts if planes[expert] is None]
    upgraded = [expert for expert in experts if planes[expert] is not None]
    for group in _chunks(base_only, at_once):
        yield group, layer.codec.decode(layer.base[group], None, dtype)
    # A 16-bit block is read where it lies: stacking several would copy them.
    for group in _chunks(upgraded, 1 if layer.codec.replaces else at_once):
        blocks = [planes[expert] for expert in group]
        stacked = blocks[0][None] if len(blocks) == 1 else torch.stack(blocks)  # type: ignore[index, arg-type]
        yield group, layer.codec.decode(layer.base[group], stacked, dtype)


def _chunks(experts: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(experts), size):
        yield experts[start : start + size]
