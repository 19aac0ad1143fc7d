"""The truth: one expert after the other, weights decoded in full. Slow, obvious, differentiable, on any device.

16-bit experts are multiplied in their own dtype, in the order of Transformers' eager loop, so that they give its very
bits. Coded experts are multiplied in float32 and rounded once, when their output is added up.
"""

import torch
from torch import Tensor

from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.gradients import expert_gradients
from dynaexq.kernels.linear_layer import linear, linear_gradient
from dynaexq.quantization import ROW_BY_ROW, Arrangement

__all__ = ["arrangement", "counts_routing", "expert_gradients", "expert_mlp", "linear", "linear_gradient"]


def expert_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
    counts: None = None,
) -> Tensor:
    """Weighted sum of each token's experts, `[N, H]`.

    Args:
        hidden_states: `[N, H]`.
        top_k_index, top_k_weights: `[N, k]`; ids outside `[0, num_experts)` are skipped.
        counts: nothing is counted here; see `counts_routing`.
    """
    output = torch.zeros_like(hidden_states)  # [N, H]
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < layer.num_experts:
            continue
        position, token = torch.where((top_k_index == expert).T)  # [n], [n]: choices in the order of the eager loop
        rows = hidden_states[token]  # [n, H]
        upgrade = upgrades.of(expert)
        weights = layer.codec.decode(
            layer.base[expert : expert + 1], None if upgrade is None else upgrade[None], torch.float32
        )
        if weights.up.dtype == torch.float32:
            rows = rows.float()
        result = layer.run_expert(rows, weights) * top_k_weights[token, position, None]  # [n, H]
        output = output.index_add(0, token, result.to(output.dtype))
    return output


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """False: the caller counts."""
    return False


def arrangement(dtype: torch.dtype) -> Arrangement:
    """As in files: any does."""
    return ROW_BY_ROW
