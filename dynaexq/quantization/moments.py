"""Second moments of the inputs of a matrix, which turn an error of its weights into one of its outputs. It does not
know how they were gathered.

An expert that saw few tokens is known badly. Its moments are blended with those of all tokens of its layer, as if it
had seen 64 more of them.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

PRIOR_TOKENS = 64
DAMPING = 0.1  # of the mean square; less trusts directions that the calibration text never took
LEAST_IMPORTANCE = 1e-3


class Inputs:
    """Second moments `[K, K]` of the inputs of one matrix, in units of their mean square.

    Args:
        moments: symmetric; columns past its own, which pad a matrix, count for nothing.
    """

    def __init__(self, moments: Tensor):
        mean = moments.diagonal().mean()
        self.moments = moments / mean if mean > 0 else torch.eye(len(moments), device=moments.device)

    @cached_property
    def damped(self) -> Tensor:
        return self.moments + DAMPING * torch.eye(len(self.moments), device=self.moments.device)

    @cached_property
    def factor(self) -> Tensor:
        """The upper Cholesky factor `[K, K]` of the inverse of the damped moments."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped.double()))
        return torch.linalg.cholesky(inverse, upper=True).float()


class InputsOfMatrices(NamedTuple):
    """What is known of the inputs of n matrices, of which the last columns may be padding.

    Attributes:
        importance: `[n, K]`, mean squares, kept clear of zero.
        moments: `[n, K, K]`, damped.
        factor: `[n, K, K]`, see `Inputs.factor`.
    """

    importance: Tensor
    moments: Tensor
    factor: Tensor

    @classmethod
    def of(cls, inputs: Sequence[Inputs], columns: int) -> "InputsOfMatrices":
        more = torch.eye(columns - len(inputs[0].moments), device=inputs[0].moments.device)

        def padded(matrices: Iterable[Tensor], padding: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(matrix, padding) if len(more) else matrix for matrix in matrices])

        diagonals = padded((i.moments for i in inputs), 0 * more).diagonal(dim1=1, dim2=2).clamp_min(LEAST_IMPORTANCE)
        return cls(diagonals, padded((i.damped for i in inputs), more), padded((i.factor for i in inputs), more))


class ExpertInputs(NamedTuple):
    """What is known of the inputs of the two matrices of one expert."""

    up: Inputs
    down: Inputs


def blended(rows: Tensor, counts: Tensor, fallback: Tensor) -> Inputs:
    """The second moments of `rows [n, K]`, each counting `counts [n]`, blended with those in `fallback [K, K]`."""
    rows = rows.float()
    own = rows.T @ (rows * counts[:, None])
    mean = own.diagonal().mean()
    if not mean > 0:
        return Inputs(fallback)
    return Inputs(own * (len(rows) / mean) + fallback * (PRIOR_TOKENS / fallback.diagonal().mean()))
