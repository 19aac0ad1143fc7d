"""16-bit dense layers on a CPU: few rows go through the native kernel, which reads weights at the memory's speed.

The result is that of `nn.Linear` within one rounding of the product; what is many rows, recorded for gradients, or
compiled is left to PyTorch. It knows no model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dynaexq.kernels import DenseProduct, dense_product
from dynaexq.runtime.experts import in_function_transform, operators_are_seen

SMALLEST = 2**16
"""Weights below which calling the kernel takes as long as it saves."""


class FewRowsLinear(nn.Module):
    """Mixin that takes the place of an `nn.Linear` (`hf.model_patch`); copies and pickles are plain layers again."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _product: DenseProduct | None = None

    def forward(self, input: Tensor) -> Tensor:
        if operators_are_seen(input) or not self._is_plain(input):
            return super().forward(input)
        product, rows = self._current_product(), input.reshape(-1, input.shape[-1])
        if product is None or len(rows) > product.most_rows:
            return super().forward(input)
        output = product(rows.contiguous()).view(*input.shape[:-1], len(self.weight))
        return output if self.bias is None else output.add_(self.bias)

    def _current_product(self) -> DenseProduct | None:
        """The product with the weight where and as it is now: others may cast or move it."""
        if self._product is None or not self._product.is_of(self.weight):
            self._product = dense_product(self.weight.detach())
        return self._product

    def _is_plain(self, input: Tensor) -> bool:
        weight = self.weight
        recorded = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        fits = input.dtype == weight.dtype and input.shape[-1] == weight.shape[1]
        return fits and not recorded and not in_function_transform()

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_product"}
        return _unfilled, (type(self).__bases__[1],), state


def _unfilled(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)
