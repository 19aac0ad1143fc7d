"""The CPU path in vectorized torch: rows grouped by expert, only routed experts decoded, many at a time."""

import torch
from torch import Tensor

from dynaexq.kernels.decoded import Choices, decoded
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades


def expert_mlp(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: ExpertLayer, upgrades: Upgrades
) -> Tensor:
    """The same sum as `reference.expert_mlp`; coded weights are rounded to the dtype of `hidden_states` first."""
    choices = Choices.of(top_k_index, layer.num_experts)
    experts, token, sizes = choices.experts, choices.token, choices.sizes
    rows = dict(zip(experts, hidden_states[token].split(sizes), strict=True))

    results: dict[int, Tensor] = {}
    for group, weights in decoded(experts, layer, upgrades, hidden_states.dtype):
        for index, expert in enumerate(group):
            results[expert] = layer.run_expert(rows[expert], weights, index)
    output = torch.zeros_like(hidden_states)  # [N, H]
    if not experts:
        return output
    weights_of_pairs = top_k_weights.T.reshape(-1)[choices.order, None]
    weighted = torch.cat([results[expert] for expert in experts]) * weights_of_pairs  # [P, H]
    # One expert at a time, as the eager loop does: a single call adds 16-bit rows up in float32, to other bits.
    for rows_of_expert, addend in zip(token.split(sizes), weighted.to(output.dtype).split(sizes), strict=True):
        output.index_add_(0, rows_of_expert, addend)
    return output
