"""The gradients of a layer's inputs, a few experts at a time; the experts themselves are constants.

A sum over experts has its gradient expert by expert: no more than a few are ever decoded, and their hidden rows are
computed again instead of being kept from the forward.
"""

from functools import partial

import torch
from torch import Tensor

from dynaexq.kernels.decoded import Choices, decoded
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades


def expert_gradients(
    grad: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden_states [N, H]` and of `top_k_weights [N, k]`, of what `reference.expert_mlp` computes.

    Multiplied in the dtype of `hidden_states`, to which coded weights are rounded first, and added up in float32.

    Args:
        grad: of the output, `[N, H]`.
    """
    choices = Choices.of(top_k_index, layer.num_experts)
    tokens = dict(zip(choices.experts, choices.token.split(choices.sizes), strict=True))
    pairs = dict(zip(choices.experts, choices.order.split(choices.sizes), strict=True))
    weights_of_pairs = top_k_weights.T.reshape(-1)  # [k N]
    grad_hidden = torch.zeros_like(hidden_states, dtype=torch.float32)
    grad_weights = torch.zeros_like(weights_of_pairs, dtype=torch.float32)
    for group, weights in decoded(choices.experts, layer, upgrades, hidden_states.dtype):
        for index, expert in enumerate(group):
            token, pair = tokens[expert], pairs[expert]
            # Inside an operator autograd records nothing; `torch.func` brings its own.
            run = partial(layer.run_expert, weights=weights, index=index)
            output, pull_back, *_ = torch.func.vjp(run, hidden_states[token])  # [n, H]
            grad_output = grad[token]
            grad_weights[pair] = (grad_output * output).sum(-1, dtype=torch.float32)
            (grad_rows,) = pull_back((grad_output * weights_of_pairs[pair, None]).to(output.dtype))
            grad_hidden.index_add_(0, token, grad_rows.float())
    return (
        grad_hidden.to(hidden_states.dtype),
        grad_weights.view(top_k_weights.T.shape).T.to(top_k_weights.dtype).contiguous(),
    )
