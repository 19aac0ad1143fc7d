"""A dense layer: what kernels need to know of a packed one, and the product that they must follow."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

from dynaexq.errors import InputError
from dynaexq.quantization import LinearCodec


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One packed matrix.

    Attributes:
        block: uint8 `[codec.nbytes]`.
        activations: what the rows may be rounded to; see `settings.Options`.
        prepared: what kernels keep for this layer.
    """

    codec: LinearCodec
    block: Tensor
    activations: str = "auto"
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def check(self, rows: Tensor, columns: int) -> None:
        """Raise an InputError unless these are floating rows `[N, columns]` where the matrix is."""
        if rows.ndim != 2 or rows.shape[1] != columns or not rows.is_floating_point():
            raise InputError(f"expected floating rows [N, {columns}], got {rows.dtype} {list(rows.shape)}")
        if rows.device != self.block.device:
            raise InputError(
                f"expected rows on {self.block.device}, where the dense layer is, got {rows.device}; move them there"
            )


class DenseProduct(Protocol):
    """The product of a few rows with one 16-bit matrix as PyTorch holds it.

    Attributes:
        most_rows: up to which it is faster than PyTorch's.
    """

    most_rows: int

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is of this matrix, where it lies now."""

    def __call__(self, rows: Tensor) -> Tensor:
        """The product `[N, matrix rows]` of `rows [N, columns]`, which lie in a row, in their dtype."""


def linear(rows: Tensor, layer: LinearLayer) -> Tensor:
    """The product `[N, matrix rows]` of `rows [N, columns]`, with the matrix decoded to their dtype first."""
    return F.linear(rows, layer.codec.decode(layer.block, rows.dtype))


def linear_gradient(grad: Tensor, layer: LinearLayer) -> Tensor:
    """The gradient `[N, columns]` of the rows, from that of the product, in its dtype."""
    return grad @ layer.codec.decode(layer.block, grad.dtype)
