"""The CPU path in vectorized torch: rows grouped by expert, only routed experts decoded, many at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.quantization import ExpertWeights

DECODED_WEIGHTS = 2**22  # weights decoded at a time: 8 MiB in bfloat16, so that they stay in cache until they are used


def expert_mlp(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: ExpertLayer, upgrades: Upgrades
) -> Tensor:
    """The same sum as `reference.expert_mlp`; coded weights are rounded to the dtype of `hidden_states` first."""
    # Choice by choice, the row order of Transformers' eager loop; foreign ids sort last.
    ids = top_k_index.T.reshape(-1)  # [N k]
    ids = torch.where((ids >= 0) & (ids < layer.num_experts), ids, layer.num_experts)
    counts = torch.bincount(ids, minlength=layer.num_experts + 1).tolist()  # [E + 1]
    routed = [expert for expert in range(layer.num_experts) if counts[expert]]
    order = torch.argsort(ids, stable=True)[: len(ids) - counts[-1]]  # [P], pairs of experts that are here
    token = order % len(hidden_states)  # [P]
    sizes = [counts[expert] for expert in routed]
    rows = dict(zip(routed, hidden_states[token].split(sizes), strict=True))

    results: dict[int, Tensor] = {}
    for experts, weights in _decoded(routed, layer, upgrades, hidden_states.dtype):
        for index, expert in enumerate(experts):
            results[expert] = layer.run_expert(rows[expert], weights, index)
    output = torch.zeros_like(hidden_states)  # [N, H]
    if not routed:
        return output
    weighted = torch.cat([results[expert] for expert in routed]) * top_k_weights.T.reshape(-1)[order, None]  # [P, H]
    # One expert at a time, as the eager loop does: a single call adds 16-bit rows up in float32, to other bits.
    for rows_of_expert, addend in zip(token.split(sizes), weighted.to(output.dtype).split(sizes), strict=True):
        output.index_add_(0, rows_of_expert, addend)
    return output


def _decoded(
    routed: list[int], layer: ExpertLayer, upgrades: Upgrades, dtype: torch.dtype
) -> Iterator[tuple[list[int], ExpertWeights]]:
    """Routed experts and their weights, in groups that are decoded together."""
    at_once = max(1, DECODED_WEIGHTS // layer.codec.shape.num_weights)
    planes = {expert: upgrades.of(expert) for expert in routed}
    base_only = [expert for expert in routed if planes[expert] is None]
    upgraded = [expert for expert in routed if planes[expert] is not None]
    for experts in _chunks(base_only, at_once):
        yield experts, layer.codec.decode(layer.base[experts], None, dtype)
    # A 16-bit block is read where it lies: stacking several would copy them.
    for experts in _chunks(upgraded, 1 if layer.codec.replaces else at_once):
        blocks = [planes[expert] for expert in experts]
        stacked = blocks[0][None] if len(blocks) == 1 else torch.stack(blocks)  # type: ignore[index, arg-type]
        yield experts, layer.codec.decode(layer.base[experts], stacked, dtype)


def _chunks(experts: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(experts), size):
        yield experts[start : start + size]
