"""The one door to the kernels: it chooses by device, and callers never ask."""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dynaexq.kernels import reference, torch_cpu
from dynaexq.kernels.layer import ExpertLayer, Upgrades

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, ExpertLayer, Upgrades], Tensor]


def expert_mlp(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: ExpertLayer, upgrades: Upgrades
) -> Tensor:
    """Weighted sum of each token's experts, `[N, H]`; see `reference.expert_mlp` for the arguments."""
    kernel = kernel_for(hidden_states.device, hidden_states.dtype, layer.codec.dtype)
    return kernel(hidden_states, top_k_index, top_k_weights, layer, upgrades)


@cache
def kernel_for(device: torch.device, activations: torch.dtype, weights: torch.dtype) -> Kernel:
    """The fastest kernel for activations and 16-bit weights of these dtypes; says so, once, if it is the slow one."""
    if device.type == "cpu":
        return torch_cpu.expert_mlp
    obstacle = _obstacle_to_triton(device, activations, weights)
    if obstacle is None:
        from dynaexq.kernels import triton  # only now: a CPU does without

        return triton.expert_mlp
    logger.warning("experts on %s run one after the other, which is slow: %s", device, obstacle)
    return reference.expert_mlp


def add_routing_for(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """How to add routing to the counters in one launch; None where several operators of torch do."""
    if _obstacle_to_triton(device) is not None:
        return None
    from dynaexq.kernels import triton

    return triton.add_routing


def _obstacle_to_triton(
    device: torch.device, activations: torch.dtype = torch.float16, weights: torch.dtype = torch.float16
) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "the fused kernel is for NVIDIA GPUs"
    if find_spec("triton") is None:
        return "the fused kernel needs Triton, which is not installed"
    if activations != weights or weights not in (torch.float16, torch.bfloat16):
        return f"the fused kernel takes float16 or bfloat16, not {activations} with weights in {weights}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernel needs compute capability 8.0"
    return None
