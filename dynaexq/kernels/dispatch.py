"""The one door to the kernels: it chooses by device, and callers never ask."""

from collections.abc import Callable

from torch import Tensor

from dynaexq.kernels import cpu, reference
from dynaexq.kernels.layer import ExpertLayer, Upgrades

_KERNELS: dict[str, Callable[..., Tensor]] = {"cpu": cpu.expert_mlp}


def expert_mlp(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: ExpertLayer, upgrades: Upgrades
) -> Tensor:
    """Weighted sum of each token's experts, `[N, H]`; see `reference.expert_mlp` for the arguments."""
    kernel = _KERNELS.get(hidden_states.device.type, reference.expert_mlp)
    return kernel(hidden_states, top_k_index, top_k_weights, layer, upgrades)
