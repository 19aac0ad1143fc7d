"""Encode an expert's weights as bytes and decode them, at one or two tiers. It knows no device memory and no kernel.

Every expert has a *base* block. A hot expert has an *upgrade* besides: the missing planes of its code (*refine*), or,
where the upgrade is 16-bit, a complete block that stands in its place (*replace*).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaexq.quantization.arrangement import ROW_BY_ROW, Arrangement
from dynaexq.quantization.grid_format import GRID_FORMATS, GridFormat
from dynaexq.quantization.layout import Array, BlockLayout, MatrixLayout
from dynaexq.quantization.moments import ExpertInputs
from dynaexq.quantization.plane_codec import (
    BASE_PLANES,
    REFINE_PLANES,
    Plane,
    PlaneCodec,
    code_arrays,
    plane_arrays,
)
from dynaexq.types import BITS, ExpertShape, Tier

MATRICES = ("up", "down")
"""The two matrices of an expert; `up` is the fused gate and up where there is a gate."""


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of n experts in the model's dtype, and their biases or None.

    Of Qwen3-30B-A3B, where the gate and up matrices are one, eight experts have `up [8, 1536, 2048]` and
    `down [8, 2048, 768]`.

    Attributes:
        up: `[n, rows, H]`, or `[n, H, rows]` where the family stores it transposed.
        down: `[n, H, I]`, or `[n, I, H]`.
        up_bias, down_bias: `[n, rows]` and `[n, H]`.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "ExpertWeights":
        """The same weights with `change` applied to every part that there is."""
        parts = (self.up_bias, self.down_bias)
        return ExpertWeights(change(self.up), change(self.down), *(None if p is None else change(p) for p in parts))

    @classmethod
    def stacked(cls, groups: Sequence["ExpertWeights"]) -> "ExpertWeights":
        """The experts of several groups, one after the other, in memory of their own."""
        parts = zip(*((g.up, g.down, g.up_bias, g.down_bias) for g in groups), strict=True)
        return cls(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]


class Encoded(NamedTuple):
    """n experts as bytes.

    At ("int2", "int4") eight experts with H = 64, I = 32 and a gate have `base [8, 2560]`, `upgrade [8, 2048]`, and
    `errors` of about [0.09, 0.006] each.

    Attributes:
        base: uint8 `[n, base.nbytes]`.
        upgrade: uint8 `[n, upgrade.nbytes]`, or None for a single tier.
        errors: float64 `[n, tiers]`, relative squared error of the weights at each tier, summed over the matrices.
    """

    base: Tensor
    upgrade: Tensor | None
    errors: np.ndarray


@dataclass(frozen=True)
class TierLayout:
    """Where the parts of an expert lie at the tiers `tiers`; known without a codec.

    Attributes:
        matrices: how each of the two matrices is cut up.
        planes, refine_planes: of the base's code, and those that an upgrade adds to it.
        form: how the grids of codes are stored.
        base, upgrade: the parts of a base block and of an upgrade slot.
    """

    tiers: tuple[str, ...]
    matrices: dict[str, MatrixLayout]
    planes: tuple[Plane, ...]
    refine_planes: tuple[Plane, ...]
    form: type[GridFormat]
    base: BlockLayout
    upgrade: BlockLayout

    def sizes(self) -> tuple[Tier, Tier | None]:
        """Bytes of a base block and of an upgrade slot."""
        base, *upgrade = self.tiers
        return Tier(base, self.base.nbytes), Tier(upgrade[0], self.upgrade.nbytes) if upgrade else None


def tier_layout(
    shape: ExpertShape, dtype: torch.dtype, tiers: tuple[str, ...], group_size: int, scale_bits: int
) -> TierLayout:
    """The layout of an expert at one or two tiers, the base first; see `ExpertCodec` for the arguments."""
    form = GRID_FORMATS[scale_bits]
    matrices = {
        "up": MatrixLayout.of(shape.up_rows, shape.hidden_size, group_size),
        "down": MatrixLayout.of(shape.hidden_size, shape.intermediate_size, group_size),
    }

    def bias(name: str) -> list[Array]:
        return [(f"{name}.bias", dtype, (matrices[name].rows,))] if shape.has_bias else []

    def dense_block() -> BlockLayout:
        flip = -1 if shape.transposed else 1
        arrays: list[Array] = []
        for name, matrix in matrices.items():
            arrays += [(f"{name}.weight", dtype, (matrix.rows, matrix.columns)[::flip]), *bias(name)]
        return BlockLayout(arrays)

    def code_block(planes: tuple[Plane, ...]) -> BlockLayout:
        arrays: list[Array] = []
        for name, matrix in matrices.items():
            arrays += [*code_arrays(name, matrix, planes, form), *bias(name)]
        return BlockLayout(arrays)

    base, upgrade = tiers[0], tiers[1] if len(tiers) > 1 else None
    planes, refine = BASE_PLANES.get(base, ()), REFINE_PLANES.get((base, upgrade), ()) if upgrade else ()
    base_block = dense_block() if base == "fp16" else code_block(planes)
    refinement = BlockLayout([array for name in matrices for array in plane_arrays(name, matrices[name], refine)])
    upgrade_block = dense_block() if upgrade == "fp16" else refinement
    return TierLayout(tiers, matrices, planes, refine, form, base_block, upgrade_block)


def tier_sizes(
    shape: ExpertShape, dtype: torch.dtype, group_size: int, scale_bits: int, choices: Iterable[tuple[str, ...]]
) -> tuple[tuple[Tier, Tier | None], ...]:
    """Base and upgrade with their bytes, for each of several tiers; see `ExpertCodec` for the arguments."""
    return tuple(tier_layout(shape, dtype, tiers, group_size, scale_bits).sizes() for tiers in choices)


class ExpertCodec(PlaneCodec):
    """Bytes of one expert at the one or two precisions of `tiers`, the base first.

    Args:
        dtype: the model's floating dtype: of 16-bit blocks and of biases.
        group_size: weights that share a scale; the largest of 128, 64, 32 up to it that divides K is taken.
        method: `"als"` or `"rtn"`.
        scale_bits: of the scale of a group, and of its zero point or minimum: 8 or 16; see `grid_format`.
        arrangement: how planes and grids lie; see `PlaneCodec`.
    """

    def __init__(
        self,
        shape: ExpertShape,
        dtype: torch.dtype,
        tiers: tuple[str, ...],
        group_size: int = 64,
        method: str = "als",
        scale_bits: int = 8,
        arrangement: Arrangement = ROW_BY_ROW,
    ):
        layout = tier_layout(shape, dtype, tiers, group_size, scale_bits)
        super().__init__(layout.matrices, tiers, layout.planes, layout.refine_planes, method, layout.form, arrangement)
        self.shape, self.dtype = shape, dtype
        self.base_layout, self.upgrade_layout = layout.base, layout.upgrade
        self.base, self.upgrade = layout.sizes()
        self.replaces = tiers[-1] == "fp16" and len(tiers) > 1

    def encode(self, weights: ExpertWeights, inputs: Sequence[ExpertInputs] | None = None) -> Encoded:
        """Pack n experts. Nothing is checked here; see `quantizer.check_representable`.

        Args:
            inputs: of each expert, where they are known and `uses_inputs`.
        """
        n = len(weights.up)
        base = torch.zeros(n, self.base.nbytes, dtype=torch.uint8, device=weights.up.device)
        errors = np.zeros((n, len(self.tiers)))
        if not self.planes:
            self.write_dense(base, weights)
            return Encoded(base, None, errors)
        upgrade = torch.zeros(n, self.upgrade_layout.nbytes, dtype=torch.uint8, device=base.device)
        base_parts, upgrade_parts = self.base_layout.view(base), self.upgrade_layout.view(upgrade)
        for name in MATRICES:
            used = inputs is not None and self.uses_inputs
            known = [getattr(of_expert, name) for of_expert in inputs or ()] if used else None
            matrix = self._oriented(getattr(weights, name))
            errors += self.encode_matrix(name, matrix, known, base_parts, upgrade_parts)
        self._write_biases(base_parts, weights)
        if self.replaces:
            self.write_dense(upgrade, weights)
        return Encoded(base, upgrade if self.upgrade else None, errors)

    def decode(self, base: Tensor, upgrade: Tensor | None, dtype: torch.dtype) -> ExpertWeights:
        """Weights of n experts in `dtype` from uint8 `base [n, base.nbytes]` and, where all have one, `upgrade`.

        A 16-bit block is returned as views of its bytes.
        """
        if upgrade is not None and self.replaces:
            return self._read_dense(self.upgrade_layout.view(upgrade))
        parts = self.base_layout.view(base)
        if not self.planes:
            return self._read_dense(parts)
        planes, bits = self.planes, BITS[self.tiers[0]]
        if upgrade is not None:
            parts = parts | self.upgrade_layout.view(upgrade)
            planes, bits = planes + self.refine_planes, BITS[self.tiers[1]]
        up, down = (self.read_code(parts, name, planes, bits, dtype) for name in MATRICES)
        return ExpertWeights(up, down, parts.get("up.bias"), parts.get("down.bias"))

    def _oriented(self, weights: Tensor) -> Tensor:
        return weights.transpose(1, 2) if self.shape.transposed else weights

    def write_dense(self, blocks: Tensor, weights: ExpertWeights) -> None:
        """Fill the 16-bit blocks, uint8 `[n, nbytes]`, of tiers that have them."""
        parts = (self.upgrade_layout if self.planes else self.base_layout).view(blocks)
        for name in MATRICES:
            parts[f"{name}.weight"].copy_(getattr(weights, name))
        self._write_biases(parts, weights)

    def _write_biases(self, parts: Mapping[str, Tensor], weights: ExpertWeights) -> None:
        if self.shape.has_bias:
            for name in MATRICES:
                parts[f"{name}.bias"].copy_(getattr(weights, f"{name}_bias"))

    def _read_dense(self, parts: Mapping[str, Tensor]) -> ExpertWeights:
        up, down = (self._oriented(parts[f"{name}.weight"]) for name in MATRICES)
        return ExpertWeights(up, down, parts.get("up.bias"), parts.get("down.bias"))
