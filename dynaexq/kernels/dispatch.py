"""The one door to the kernels: it chooses by device, and callers never ask."""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dynaexq.kernels import cpu, reference
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.memory.graph_sync import PlainExchange

logger = logging.getLogger(__name__)


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
    if _runs_in_triton(hidden_states, layer):
        from dynaexq.kernels import triton  # only now: a CPU does without

        return triton.expert_mlp(hidden_states, top_k_index, top_k_weights, layer, upgrades, counts)
    return reference.expert_mlp(hidden_states, top_k_index, top_k_weights, layer, upgrades)


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """Whether the kernel for these rows counts the routing itself: for a dozen operators a small model has no time."""
    if hidden_states.device.type == "cpu":
        return cpu.native_layer(layer, hidden_states.dtype) is not None
    return _runs_in_triton(hidden_states, layer)


def exchange_for(device: torch.device, dtype: torch.dtype) -> PlainExchange | None:
    """What a model of this dtype on `device` exchanges words by, or None where no graph can be captured anyway."""
    if device.type != "cuda" or not triton_runs(device, dtype, dtype):
        return None
    from dynaexq.kernels.triton import TritonExchange  # only now: a CPU does without

    return TritonExchange()


def _runs_in_triton(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    return triton_runs(hidden_states.device, hidden_states.dtype, layer.codec.dtype)


@cache
def triton_runs(device: torch.device, activations: torch.dtype, weights: torch.dtype) -> bool:
    """Whether the fused kernel takes activations and 16-bit weights of these dtypes; if not, says why, once."""
    obstacle = _obstacle_to_triton(device, activations, weights)
    if obstacle is not None:
        logger.warning("experts on %s run one after the other, which is slow: %s", device, obstacle)
    return obstacle is None


def _obstacle_to_triton(device: torch.device, activations: torch.dtype, weights: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "the fused kernel is for NVIDIA GPUs"
    if find_spec("triton") is None:
        return "the fused kernel needs Triton, which is not installed"
    if activations != weights or weights not in (torch.float16, torch.bfloat16):
        return f"the fused kernel takes float16 or bfloat16, not {activations} with weights in {weights}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernel needs compute capability 8.0"
    return None
