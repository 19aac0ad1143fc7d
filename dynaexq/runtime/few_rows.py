"""16-bit dense layers, routers and norms on a CPU: few rows go through the native kernel.

The result is that of the module's own forward within one rounding of the product; what is many rows, recorded for
gradients, or looked at operator by operator is left to PyTorch. It knows no model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaexq.kernels import (
    DenseProduct,
    NormKind,
    RoutingKind,
    RowNorm,
    dense_product,
    rms_norm,
    row_norm,
    top_k_routing,
)
from dynaexq.runtime.experts import in_function_transform, must_be_operators

SMALLEST = 2**16
"""Weights of a dense layer below which calling the kernel takes as long as it saves."""

MOST_NORMALIZED = 2**16
"""Elements beyond which PyTorch's threads normalize faster than one."""

ROUTING_KINDS = [RoutingKind(normalized, rounded) for normalized in (False, True) for rounded in (False, True)]

OWN = ("_native", "_kind")
"""Attributes that a module has only while a mixin is in its place."""


class FewRows(nn.Module):
    """Mixin that takes the place of a module with a weight (`hf.model_patch`); copies and pickles are plain again."""

    weight: nn.Parameter
    _native: Any = None

    def takes_native_way(self, input: Tensor) -> bool:
        """Whether PyTorch need not see the operators on `input`, and it fits the weight."""
        if must_be_operators(input, self.weight) or in_function_transform():
            return False
        return input.dtype == self.weight.dtype and input.shape[-1] == self.weight.shape[-1]

    def current(self) -> Any:
        """What is native, of the weight where and as it is now: others may cast or move it; None where nothing is."""
        if self._native is None or not self._native.is_of(self.weight):
            self._native = self.made()
        return self._native

    def made(self) -> Any:
        """What is native, made anew."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in OWN}
        return _unfilled, (type(self).__bases__[1],), state


class FewRowsProduct(FewRows):
    """What begins with a product with its weight."""

    def product(self, input: Tensor) -> Tensor | None:
        """The product `[rows, outputs]`, natively; None where that is not its way."""
        native = self.current() if self.takes_native_way(input) else None
        rows = input.reshape(-1, input.shape[-1])
        return None if native is None or len(rows) > native.most_rows else native(rows.contiguous())

    def made(self) -> DenseProduct | None:
        return dense_product(self.weight.detach())


class FewRowsLinear(FewRowsProduct):
    """An `nn.Linear`."""

    bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        product = self.product(input)
        if product is None:
            return super().forward(input)
        output = product.view(*input.shape[:-1], len(self.weight))
        return output if self.bias is None else output.add_(self.bias)


class FewRowsRouter(FewRowsProduct):
    """A router, of a kind that `routing_kind` knows: the product is native, what follows it PyTorch's."""

    top_k: int
    _kind: RoutingKind

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = None if args or kwargs else self.product(hidden_states)
        if logits is None:
            return super().forward(hidden_states, *args, **kwargs)
        return logits, *top_k_routing(logits, self.top_k, self._kind)


class FewRowsNorm(FewRows):
    """A root mean square norm, of a kind that `norm_kind` knows."""

    _kind: NormKind

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        alone = not args and not kwargs and hidden_states.numel() <= MOST_NORMALIZED
        norm = self.current() if alone and self.takes_native_way(hidden_states) else None
        return super().forward(hidden_states, *args, **kwargs) if norm is None else norm(hidden_states)

    def made(self) -> RowNorm | None:
        return row_norm(self.weight.detach(), self._kind)


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of a norm whose forward gives the very bits of `rms_norm`, found by trying; else None."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.ndim != 1 or epsilon is None:
        return None
    rows = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    rows[1] *= 1e-3  # where epsilon counts
    try:
        expected = module.forward(rows)
    except Exception:  # it wants more than rows, or is on another device
        return None
    kinds = (NormKind(epsilon, added, rounded) for added, rounded in ((0, True), (0, False), (1, False)))
    return next((kind for kind in kinds if torch.equal(expected, rms_norm(rows, weight, kind))), None)


@torch.no_grad()
def routing_kind(module: nn.Module) -> RoutingKind | None:
    """The kind of a router whose forward gives the very bits of a product and `top_k_routing`, found by trying.

    One that has more than a weight may route otherwise when that changes, and has none.
    """
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    tensors = [*module.parameters(), *module.buffers()]
    if not isinstance(top_k, int) or len(tensors) != 1 or weight is not tensors[0] or weight.ndim != 2:
        return None
    rows = torch.randn(32, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        found = module.forward(rows)
        logits = F.linear(rows, weight)
        tried = {kind: (logits, *top_k_routing(logits, top_k, kind)) for kind in ROUTING_KINDS}
    except Exception:  # it wants more than rows, or is on another device
        return None
    return next((kind for kind, expected in tried.items() if _are_equal(found, expected)), None)


def _are_equal(found: Any, expected: tuple[Tensor, ...]) -> bool:
    if not isinstance(found, tuple) or len(found) != len(expected):
        return False
    return all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


def mixin_for(module: nn.Module) -> type[FewRows] | None:
    """The mixin to take the place of `module`, where that pays; the module gets what the mixin needs."""
    native: DenseProduct | RowNorm | None = None
    kind: NormKind | RoutingKind | None
    if type(module) is nn.Linear:
        mixin: type[FewRows] = FewRowsLinear
        native = _product_with(module)
    elif (kind := norm_kind(module)) is not None:
        mixin, module._kind = FewRowsNorm, kind  # type: ignore[assignment]
        native = row_norm(module.weight.detach(), kind)  # type: ignore[operator]
    elif (kind := routing_kind(module)) is not None:
        mixin, module._kind = FewRowsRouter, kind  # type: ignore[assignment]
        native = _product_with(module)
    if native is None:
        forgotten(module)
        return None
    module._native = native  # type: ignore[assignment]
    return mixin


def _product_with(module: Any) -> DenseProduct | None:
    weight = module.weight.detach()
    return dense_product(weight) if weight.numel() >= SMALLEST else None


def forgotten(module: nn.Module) -> None:
    """Take away what `mixin_for` and the mixins have left with a module."""
    for name in OWN:
        module.__dict__.pop(name, None)


def _unfilled(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)
