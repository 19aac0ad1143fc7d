"""The one door to the kernels: it chooses by device, and callers never ask."""

from torch import Tensor

from dynaexq.kernels import cpu, reference
from dynaexq.kernels.layer import ExpertLayer, Upgrades


def expert_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
    counts: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each token's experts, `[N, H]`; see `reference.expert_mlp` for the arguments.

    Args:
        counts: where `counts_routing` says so, int64 `[num_experts + 2]` to which the routing is added, as
            `memory.RoutingCounter` does: units of mass of each expert, of foreign ids, and tokens.
    """
    if hidden_states.device.type == "cpu":
        return cpu.expert_mlp(hidden_states, top_k_index, top_k_weights, layer, upgrades, counts)
    return reference.expert_mlp(hidden_states, top_k_index, top_k_weights, layer, upgrades)


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """Whether the kernel for these rows counts the routing in passing, for which a small model has no time else."""
    return hidden_states.device.type == "cpu" and cpu.native_layer(layer, hidden_states.dtype) is not None
