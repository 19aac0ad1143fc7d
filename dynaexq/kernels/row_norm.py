"""Root mean square norms (Zhang and Sennrich, 2019), rounded as in Transformers: the formula, and that of few rows.

It knows no model.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class NormKind(NamedTuple):
    """What norms differ in: `NormKind(1e-6, added=0, rounded=True)` is that of Qwen3-MoE, `(1e-6, 1, False)` of
    Qwen3-Next.

    Attributes:
        added: 1 where weights are kept as their difference from 1, else 0.
        rounded: whether the quotient is rounded before it is multiplied, or only the product.
    """

    epsilon: float
    added: int
    rounded: bool


class RowNorm(Protocol):
    """One norm of few rows."""

    def is_of(self, weight: Tensor) -> bool:
        """Whether it has this weight, where it lies now."""

    def __call__(self, rows: Tensor) -> Tensor:
        """`rms_norm` of rows `[..., columns]`."""


def rms_norm(rows: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    """Rows `[..., columns]` by their root mean square, times `weight [columns]`, in the dtype of the rows."""
    exact = rows.float()
    quotient = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + kind.epsilon)
    if kind.rounded:
        return (weight + kind.added) * quotient.to(rows.dtype)
    return (quotient * (weight.float() + kind.added)).to(rows.dtype)
