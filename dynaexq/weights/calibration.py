"""What calibration knows of a model: for each expert, the second moments of the inputs of its two matrices.

They are as large as squares of the hidden size, 100 GB for 48 layers of 128 experts of 2048; so no file has them. A
`CalibrationSample` has what the experts of each layer met, rows and choices, and makes the moments of one expert
after the other from them and from the weights at hand: 32,768 rows take 6.4 GB there. `LayerMoments` is what earlier
versions knew instead.

Dense layers have whole moments in the file; those that meet the same inputs share one. How any of it was gathered is
not known here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaexq.errors import QuantizationError
from dynaexq.quantization import PRIOR_TOKENS, ExpertInputs, ExpertWeights, Inputs, blended
from dynaexq.types import ExpertShape

Activation = Callable[[Tensor], Tensor]


class Calibration(Protocol):
    """What is known of the inputs of a model's matrices.

    Attributes:
        layers: paths of the experts modules.
        fingerprint: of all of it.
    """

    @property
    def layers(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "Calibration":
        """The same of some layers, and of a run of their experts, both counted from 0 there."""

    def of_experts(self, layer: int, first: int, weights: ExpertWeights, shape: ExpertShape) -> Iterator[ExpertInputs]:
        """What is known of each of the experts from `first` on, whose `weights` these are, on their device."""

    def of_dense(self, path: str, columns: int, device: torch.device) -> list[Inputs] | None:
        """What is known of the inputs of the dense layer at `path`, as `LinearCodec.encode` wants it; None if nothing.

        Raises:
            QuantizationError: it has another number of inputs.
        """


@dataclass(frozen=True)
class DenseMoments:
    """Of the inputs of dense layers: float16 `[K, K]`, in units of their mean square, by path."""

    of_path: Mapping[str, Tensor] = field(default_factory=dict)

    def inputs(self, path: str, columns: int, device: torch.device) -> list[Inputs] | None:
        """See `Calibration.of_dense`."""
        moments = self.of_path.get(path)
        if moments is None:
            return None
        if moments.shape != (columns, columns):
            raise QuantizationError(
                f"{path}: expected moments of {columns} inputs, calibration has {len(moments)}; calibrate this model"
            )
        return [Inputs(moments.to(device).float())]


class Met(NamedTuple):
    """What the experts of one layer met.

    Attributes:
        rows: `[T, H]`, in the dtype of the model.
        top_k_index: int16 `[T, k]`.
        top_k_weights: float32 `[T, k]`.
    """

    rows: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor

    def moments(self) -> Tensor:
        """`[H, H]`, of all rows, each counting the squares of its weights."""
        rows = self.rows.float()
        return rows.T @ (rows * self.top_k_weights.square().sum(1, keepdim=True))

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The rows `[n, H]` that met an expert, and what each counts: the square of its routing weight."""
        token, choice = torch.where(self.top_k_index == expert)
        return self.rows[token], self.top_k_weights[token, choice].square()


@dataclass(frozen=True)
class CalibrationSample:
    """What the experts of each layer met, read layer by layer. A `Calibration`.

    Attributes:
        layers: paths of the experts modules.
        activations: of each layer's experts, as `ExpertLayer` has it.
        read: what the experts of a layer met, by its path.
        first_expert: the one that is counted as the first.
    """

    layers: tuple[str, ...]
    activations: Mapping[str, Activation]
    read: Callable[[str], Met]
    dense: DenseMoments
    fingerprint: str
    first_expert: int = 0
    _latest: dict[str, tuple[Met, Tensor]] = field(default_factory=dict, repr=False)

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "CalibrationSample":
        names = tuple(self.layers[layer] for layer in layers)
        return replace(self, layers=names, first_expert=self.first_expert + first_expert)

    def of_experts(self, layer: int, first: int, weights: ExpertWeights, shape: ExpertShape) -> Iterator[ExpertInputs]:
        name = self.layers[layer]
        met, moments = self._layer(name, weights.up.device)
        alike = torch.eye(shape.intermediate_size, device=weights.up.device)
        for i in range(len(weights.up)):
            rows, counts = met.of(self.first_expert + first + i)
            units = self.activations[name](_product(rows, weights, i, shape.transposed)).float()
            # A few tokens have units a hundred times as long as others; what an error does to those says little of
            # the rest, so that all count at one length.
            units = units / units.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            yield ExpertInputs(blended(rows, counts, moments), blended(units, counts, alike))

    def of_dense(self, path: str, columns: int, device: torch.device) -> list[Inputs] | None:
        return self.dense.inputs(path, columns, device)

    def _layer(self, name: str, device: torch.device) -> tuple[Met, Tensor]:
        """What a layer met and its moments; the latest are kept, as experts come a few at a time."""
        if name not in self._latest:
            self._latest.clear()
            met = Met(*(part.to(device) for part in self.read(name)))
            self._latest[name] = met, met.moments()
        return self._latest[name]


def _product(rows: Tensor, weights: ExpertWeights, expert: int, transposed: bool) -> Tensor:
    """What an expert's first matrix makes of its rows."""
    matrix = weights.up[expert].T if transposed else weights.up[expert]
    bias = None if weights.up_bias is None else weights.up_bias[expert].to(rows.dtype)
    return F.linear(rows, matrix.to(rows.dtype), bias)


@dataclass(frozen=True)
class LayerMoments:
    """What files of earlier versions know: moments of a layer's hidden states, which all of its experts share, and
    of the units of each expert in blocks of 64; float32. A `Calibration`.

    Attributes:
        up: `[L, H, H]`, of the hidden states that a layer routes, weighed by their squared routing weights.
        down: `[L, E, B, 64, 64]`, of the units of each expert, every token at the same length; B blocks hold the I
            units, the last padded by zeros.
        tokens: `[L, E]`, how many tokens each expert saw.
    """

    layers: tuple[str, ...]
    up: Tensor
    down: Tensor
    tokens: Tensor
    dense: DenseMoments
    fingerprint: str

    def select(self, layers: Sequence[int], first_expert: int, num_experts: int) -> "LayerMoments":
        experts, rows = slice(first_expert, first_expert + num_experts), list(layers)
        return replace(
            self,
            layers=tuple(self.layers[layer] for layer in layers),
            up=self.up[rows],
            down=self.down[rows, experts],
            tokens=self.tokens[rows, experts],
        )

    def of_experts(self, layer: int, first: int, weights: ExpertWeights, shape: ExpertShape) -> Iterator[ExpertInputs]:
        device, units = weights.up.device, shape.intermediate_size
        up = Inputs(self.up[layer].to(device))
        for expert in range(first, first + len(weights.up)):
            own = torch.block_diag(*self.down[layer, expert].to(device))[:units, :units]
            prior = torch.eye(units, device=device) * (PRIOR_TOKENS * own.diagonal().mean())
            yield ExpertInputs(up, Inputs(own * float(self.tokens[layer, expert]) + prior))

    def of_dense(self, path: str, columns: int, device: torch.device) -> list[Inputs] | None:
        return self.dense.inputs(path, columns, device)
