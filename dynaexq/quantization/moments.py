"""What calibration knows of the inputs of matrices: their second moments, which turn an error of weights into one of
outputs. It does not know how they were gathered.

The first matrix of every expert of a layer meets the same hidden states, so one matrix `[H, H]` a layer serves them
all. The units inside an expert are its own; of their second moments `[I, I]` the diagonal blocks of 64 are kept. For
48 layers of 128 experts of 2048 and 768 that is 0.8 + 1.2 GB.

Dense layers have whole moments of their own: blocks brought the embedded model half as much (docs/log.md). In float16,
and once for layers that meet the same inputs, those of the same 48 layers are 2.0 GB.

An expert that saw few tokens is known badly. Its moments are blended with those of inputs that are all alike, as if it
had seen 64 tokens of them; with none at all it is quantized as if nothing were known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dynaexq.errors import QuantizationError

BLOCK = 64
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

    def padded(self, columns: int) -> tuple[Tensor, Tensor]:
        """For a matrix of `columns`, some of which may be padding: their diagonal `[columns]`, kept clear of zero,
        and the upper Cholesky factor `[columns, columns]` of the inverse of the damped moments."""
        more = torch.eye(columns - len(self.moments), device=self.moments.device)
        diagonal = torch.block_diag(self.moments, 0 * more).diagonal().clamp_min(LEAST_IMPORTANCE)
        return diagonal, torch.block_diag(self._factor, more) if len(more) else self._factor

    @cached_property
    def _factor(self) -> Tensor:
        damped = self.moments.double() + DAMPING * torch.eye(len(self.moments), device=self.moments.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True).float()


class ExpertInputs(NamedTuple):
    """What is known of the inputs of the two matrices of one expert."""

    up: Inputs
    down: Inputs


@dataclass(frozen=True)
class Moments:
    """Second moments of a model, float32 where nothing else is said.

    Attributes:
        layers: paths of the experts modules.
        up: `[L, H, H]`, of the hidden states that a layer routes, weighed by their squared routing weights.
        down: `[L, E, B, 64, 64]`, of the units of each expert, every token at the same length; B blocks hold the I
            units, the last padded by zeros.
        tokens: `[L, E]`, how many tokens each expert saw.
        dense: float16 `[K, K]` of the inputs of a dense layer, in units of their mean square, by its path.
    """

    layers: tuple[str, ...]
    up: Tensor
    down: Tensor
    tokens: Tensor
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.tokens.shape[1]

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "Moments":
        """Those of some layers, and of the experts from `first_expert` on."""
        experts = slice(first_expert, first_expert + num_experts)
        names = tuple(self.layers[layer] for layer in layers)
        rows = list(layers)
        return Moments(names, self.up[rows], self.down[rows, experts], self.tokens[rows, experts], self.dense)

    def of_layer(self, layer: int, units: int, device: torch.device) -> Iterator[ExpertInputs]:
        """What is known of each expert of a layer in turn, whose second matrix has `units` inputs."""
        up = Inputs(self.up[layer].to(device))
        for expert in range(self.num_experts):
            yield ExpertInputs(up, self._down(layer, expert, units, device))

    def of_dense(self, path: str, columns: int, device: torch.device) -> list[Inputs] | None:
        """What is known of the inputs of the dense layer at `path`, as `LinearCodec.encode` wants it; None if nothing.

        Raises:
            QuantizationError: it has another number of inputs.
        """
        moments = self.dense.get(path)
        if moments is None:
            return None
        if moments.shape != (columns, columns):
            raise QuantizationError(
                f"{path}: expected moments of {columns} inputs, calibration has {len(moments)}; calibrate this model"
            )
        return [Inputs(moments.to(device).float())]

    def _down(self, layer: int, expert: int, units: int, device: torch.device) -> Inputs:
        own = torch.block_diag(*self.down[layer, expert].to(device))[:units, :units]
        tokens, mean = float(self.tokens[layer, expert]), own.diagonal().mean()
        return Inputs(own * tokens + torch.eye(units, device=device) * (PRIOR_TOKENS * mean))
