"""Dispatch to the backend of a device: callers never ask which one it is."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from dynaexq.kernels import reference
from dynaexq.kernels.decode_attention import DecodeAttention
from dynaexq.kernels.decoder_layer import DecoderLayer, DecoderParts
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.linear_layer import DenseProduct, LinearLayer
from dynaexq.kernels.row_norm import NormKind, RowNorm
from dynaexq.memory.graph_sync import PlainExchange
from dynaexq.quantization import Arrangement

logger = logging.getLogger(__name__)

BACKENDS = {"cpu": "dynaexq.kernels.cpu", "cuda": "dynaexq.kernels.triton"}
"""Device type -> the module that multiplies there, imported when it is first needed. Every other device, and what the
module of a device does not take, is left to `reference`."""


class Backend(Protocol):
    """What a module of `BACKENDS` offers."""

    def expert_mlp(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        layer: ExpertLayer,
        upgrades: Upgrades,
        counts: Tensor | None = None,
    ) -> Tensor:
        """See `dispatch.expert_mlp`."""

    def expert_gradients(
        self,
        grad: Tensor,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        layer: ExpertLayer,
        upgrades: Upgrades,
    ) -> tuple[Tensor, Tensor]:
        """See `gradients.expert_gradients`."""

    def arrangement(self, dtype: torch.dtype) -> Arrangement:
        """See `arrangement_on`."""

    def counts_routing(self, hidden_states: Tensor, layer: ExpertLayer) -> bool:
        """Whether `expert_mlp` takes `counts` for these rows."""

    def linear(self, rows: Tensor, layer: LinearLayer) -> Tensor:
        """See `linear_layer.linear`."""

    def linear_gradient(self, grad: Tensor, layer: LinearLayer) -> Tensor:
        """See `linear_layer.linear_gradient`."""


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
    backend = _backend_for(hidden_states, layer)
    return backend.expert_mlp(hidden_states, top_k_index, top_k_weights, layer, upgrades, counts)


def expert_gradients(
    grad: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden_states` and `top_k_weights`; see `gradients.expert_gradients` for the arguments."""
    backend = _backend_for(hidden_states, layer)
    return backend.expert_gradients(grad, hidden_states, top_k_index, top_k_weights, layer, upgrades)


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """Whether the kernel for these rows counts the routing itself, which saves a small model a dozen operators."""
    return _backend_for(hidden_states, layer).counts_routing(hidden_states, layer)


def linear(rows: Tensor, layer: LinearLayer) -> Tensor:
    """The product `[N, matrix rows]` of `rows [N, columns]`, in their dtype, to which codes may be rounded first."""
    return _backend(rows.device, rows.dtype, layer.codec.dtype).linear(rows, layer)


def linear_gradient(grad: Tensor, layer: LinearLayer) -> Tensor:
    """The gradient `[N, columns]` of the rows, from that of the product `[N, matrix rows]`, in its dtype."""
    return _backend(grad.device, grad.dtype, layer.codec.dtype).linear_gradient(grad, layer)


def dense_product(weight: Tensor) -> DenseProduct | None:
    """What multiplies few rows faster than PyTorch does with this matrix; None where PyTorch is as good."""
    if weight.device.type != "cpu":
        return None
    from dynaexq.kernels import cpu

    return cpu.dense_product(weight)


def row_norm(weight: Tensor, kind: NormKind) -> RowNorm | None:
    """What normalizes few rows faster than PyTorch does, with this weight; None where PyTorch is as good."""
    if weight.device.type != "cpu":
        return None
    from dynaexq.kernels import cpu

    return cpu.row_norm(weight, kind)


@cache
def decode_attention(device: torch.device) -> DecodeAttention | None:
    """What computes the attention of few queries on `device` faster than PyTorch does; None where it is as good."""
    if device.type != "cpu":
        return None
    from dynaexq.kernels import cpu

    return cpu.decode_attention()


def decoder_layer(parts: DecoderParts) -> DecoderLayer | None:
    """What computes a decoder layer of these parts, besides attention, in two calls; None where nothing does."""
    if parts.experts.base.device.type != "cpu":
        return None
    from dynaexq.kernels import cpu

    return cpu.decoder_layer(parts)


def compiles_on(device: torch.device) -> bool:
    """Whether kernels are compiled layer by layer there; on a CPU they are compiled once for all."""
    return device.type == "cuda"


def compilations(
    experts: Sequence[ExpertLayer], linears: Sequence[LinearLayer], choices: int
) -> list[Callable[[], None]]:
    """Calls that compile the kernels of these layers, in any order and on any thread; none where none are.

    Args:
        experts, linears: of one model.
        choices: experts of a token.
    """
    taken = [layer for layer in experts if _runs_triton(layer.base.device, layer.codec.dtype)]
    dense = [layer for layer in linears if _runs_triton(layer.block.device, layer.codec.dtype)]
    if not taken and not dense:
        return []
    from dynaexq.kernels.triton import warm_up  # a CPU does without

    return warm_up.compilations(taken, dense, choices)


def _runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and triton_runs(device, dtype, dtype)


def arrangement_on(device: torch.device, dtype: torch.dtype) -> Arrangement:
    """How the codes of a model of `dtype` should lie that is multiplied on `device`."""
    return _backend(device, dtype, dtype).arrangement(dtype)


def exchange_for(device: torch.device, dtype: torch.dtype) -> PlainExchange | None:
    """How a model of this dtype on `device` exchanges words with the host; None where no graph can be captured."""
    if not _runs_triton(device, dtype):
        return None
    from dynaexq.kernels.triton import TritonExchange  # a CPU does without

    return TritonExchange()


def _backend_for(hidden_states: Tensor, layer: ExpertLayer) -> Backend:
    return _backend(hidden_states.device, hidden_states.dtype, layer.codec.dtype)


@cache
def _backend(device: torch.device, activations: torch.dtype, weights: torch.dtype) -> Backend:
    """The backend for these dtypes on `device`."""
    module = BACKENDS.get(device.type)
    if module is None:
        logger.warning(
            "experts on %s are decoded by PyTorch and multiplied one after the other, which is slow: there are no "
            'kernels for it; device="cpu" has some', device,
        )  # fmt: skip
        return cast(Backend, reference)
    if device.type == "cuda" and not triton_runs(device, activations, weights):
        return cast(Backend, reference)
    return cast(Backend, import_module(module))


@cache
def triton_runs(device: torch.device, activations: torch.dtype, weights: torch.dtype) -> bool:
    """Whether the fused kernel takes activations and 16-bit weights of these dtypes; if not, says why, once."""
    obstacle = _obstacle_to_triton(device, activations, weights)
    if obstacle is not None:
        logger.warning("experts on %s run one after the other, which is slow: %s", device, obstacle)
    return obstacle is None


def _obstacle_to_triton(device: torch.device, activations: torch.dtype, weights: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "the fused kernel is for GPUs of NVIDIA and AMD"
    if find_spec("triton") is None:
        return "the fused kernel needs Triton, which is not installed"
    if activations != weights or weights not in (torch.float16, torch.bfloat16):
        return f"the fused kernel takes float16 or bfloat16, not {activations} with weights in {weights}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernel needs compute capability 8.0"
    return None
