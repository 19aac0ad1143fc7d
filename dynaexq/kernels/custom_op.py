"""The opaque operators that a layer of experts, and a packed dense layer, are to PyTorch.

`torch.compile` sees a call it need not understand, with a fake implementation and a gradient; whatever changes behind
it (tables, counters, slots) lies at fixed addresses and stays out of the graph. Layers are found by a handle.
"""

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Layer(Protocol):
    """The layer behind a handle."""

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The layer's output `[N, H]`; its routing is counted."""

    def gradients(
        self, grad: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `hidden_states` and of `top_k_weights`."""


class Matrix(Protocol):
    """The packed dense layer behind a handle."""

    out_features: int
    in_features: int

    def compute(self, rows: Tensor) -> Tensor:
        """The product `[N, out_features]` of rows `[N, in_features]`."""

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the rows, from that of the product."""


_matrices: "WeakValueDictionary[int, Matrix]" = WeakValueDictionary()
_layers: "WeakValueDictionary[int, Layer]" = WeakValueDictionary()
_handles = itertools.count()


def register_layer(layer: Layer) -> int:
    """A handle for `layer`, good for as long as the layer lives."""
    handle = next(_handles)
    _layers[handle] = layer
    return handle


def register_matrix(matrix: Matrix) -> int:
    """A handle for `matrix`, good for as long as it lives."""
    handle = next(_handles)
    _matrices[handle] = matrix
    return handle


@torch.library.custom_op("dynaexq::experts", mutates_args=())
def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int) -> Tensor:
    """Weighted sum of each token's experts `[N, H]` in the layer behind `handle`."""
    return _layers[handle].compute(hidden_states, top_k_index, top_k_weights).contiguous()


@experts.register_fake
def _(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)  # row by row, however its rows lie


@torch.library.custom_op("dynaexq::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden_states` and of `top_k_weights`; as opaque as the operator they belong to."""
    grad_hidden, grad_weights = _layers[handle].gradients(grad, hidden_states, top_k_index, top_k_weights)
    return grad_hidden.contiguous(), grad_weights.contiguous()


@experts_backward.register_fake
def _(
    grad: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int
) -> tuple[Tensor, Tensor]:
    return hidden_states.new_empty(hidden_states.shape), top_k_weights.new_empty(top_k_weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.handle = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
    grad_hidden, grad_weights = experts_backward(grad, *ctx.saved_tensors, ctx.handle)
    return grad_hidden, None, grad_weights, None


experts.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("dynaexq::linear", mutates_args=())
def linear(rows: Tensor, handle: int) -> Tensor:
    """The product of `rows [N, in_features]` with the matrix behind `handle`."""
    return _matrices[handle].compute(rows)


@linear.register_fake
def _(rows: Tensor, handle: int) -> Tensor:
    return rows.new_empty(len(rows), _matrices[handle].out_features)


@torch.library.custom_op("dynaexq::linear_backward", mutates_args=())
def linear_backward(grad: Tensor, handle: int) -> Tensor:
    """The gradient of the rows."""
    return _matrices[handle].gradient(grad)


@linear_backward.register_fake
def _(grad: Tensor, handle: int) -> Tensor:
    return grad.new_empty(len(grad), _matrices[handle].in_features)


def _keep_handle(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.handle = inputs


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return linear_backward(grad, ctx.handle), None


linear.register_autograd(_linear_gradient, setup_context=_keep_handle)
