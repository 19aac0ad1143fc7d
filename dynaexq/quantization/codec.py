"""Encode an expert's weights as bytes and decode them, at one or two tiers. It knows no device memory and no kernel.

Every expert has a *base* block. A hot expert has an *upgrade* besides: the missing planes of its code (*refine*), or,
where the upgrade is 16-bit, a complete block that stands in its place (*replace*).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaexq.quantization.bitplanes import pack_plane, unpack_plane
from dynaexq.quantization.layout import BlockLayout, MatrixLayout
from dynaexq.quantization.moments import ExpertInputs, Inputs
from dynaexq.quantization.quantize import Code, dequantize, dequantize_at, quantize
from dynaexq.types import BITS, ExpertShape, Tier

MATRICES = ("up", "down")
"""The two matrices of an expert; `up` is the fused gate and up where there is a gate."""


CODED_AT_ONCE = {False: 2**18, True: 2**24}
"""Weights coded together on a CPU, where the float32 copies of them should stay in cache, and on a GPU."""


class Plane(NamedTuple):
    """`bits` of every 8-bit code, starting at bit `shift`."""

    name: str
    bits: int
    shift: int


_Array = tuple[str, torch.dtype, tuple[int, ...]]

_TOP2, _MIDDLE2, _TOP4, _LOW4 = Plane("top2", 2, 6), Plane("middle2", 2, 4), Plane("top4", 4, 4), Plane("low4", 4, 0)

BASE_PLANES = {"int2": (_TOP2,), "int4": (_TOP4,), "int8": (_TOP4, _LOW4)}
REFINE_PLANES = {("int2", "int4"): (_MIDDLE2,), ("int2", "int8"): (_MIDDLE2, _LOW4), ("int4", "int8"): (_LOW4,)}


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
        base, upgrade: the parts of a base block and of an upgrade slot.
    """

    tiers: tuple[str, ...]
    matrices: dict[str, MatrixLayout]
    planes: tuple[Plane, ...]
    refine_planes: tuple[Plane, ...]
    base: BlockLayout
    upgrade: BlockLayout

    def sizes(self) -> tuple[Tier, Tier | None]:
        """Bytes of a base block and of an upgrade slot."""
        base, *upgrade = self.tiers
        return Tier(base, self.base.nbytes), Tier(upgrade[0], self.upgrade.nbytes) if upgrade else None


def tier_layout(shape: ExpertShape, dtype: torch.dtype, tiers: tuple[str, ...], group_size: int) -> TierLayout:
    """The layout of an expert at one or two tiers, the base first; see `ExpertCodec` for the arguments."""
    matrices = {
        "up": MatrixLayout.of(shape.up_rows, shape.hidden_size, group_size),
        "down": MatrixLayout.of(shape.hidden_size, shape.intermediate_size, group_size),
    }

    def bias(name: str) -> list[_Array]:
        return [(f"{name}.bias", dtype, (matrices[name].rows,))] if shape.has_bias else []

    def dense_block() -> BlockLayout:
        flip = -1 if shape.transposed else 1
        arrays: list[_Array] = []
        for name, matrix in matrices.items():
            arrays += [(f"{name}.weight", dtype, (matrix.rows, matrix.columns)[::flip]), *bias(name)]
        return BlockLayout(arrays)

    def planes_of(name: str, planes: tuple[Plane, ...]) -> list[_Array]:
        return [(f"{name}.{plane.name}", torch.int32, matrices[name].words(plane.bits)) for plane in planes]

    def code_block(planes: tuple[Plane, ...]) -> BlockLayout:
        arrays: list[_Array] = []
        for name, matrix in matrices.items():
            meta = (f"{name}.meta", torch.float16, (matrix.num_groups, matrix.rows, 2))
            arrays += [*planes_of(name, planes), meta, *bias(name)]
        return BlockLayout(arrays)

    base, upgrade = tiers[0], tiers[1] if len(tiers) > 1 else None
    planes, refine = BASE_PLANES.get(base, ()), REFINE_PLANES.get((base, upgrade), ()) if upgrade else ()
    base_block = dense_block() if base == "fp16" else code_block(planes)
    refinement = BlockLayout([array for name in matrices for array in planes_of(name, refine)])
    return TierLayout(tiers, matrices, planes, refine, base_block, dense_block() if upgrade == "fp16" else refinement)


def tier_sizes(
    shape: ExpertShape, dtype: torch.dtype, group_size: int, choices: Iterable[tuple[str, ...]]
) -> tuple[tuple[Tier, Tier | None], ...]:
    """Base and upgrade with their bytes, for each of several tiers; see `ExpertCodec` for the arguments."""
    return tuple(tier_layout(shape, dtype, tiers, group_size).sizes() for tiers in choices)


class ExpertCodec:
    """Bytes of one expert at the one or two precisions of `tiers`, the base first.

    Args:
        dtype: the model's floating dtype: of 16-bit blocks and of biases.
        group_size: weights that share a scale; the largest of 128, 64, 32 up to it that divides K is taken.
        method: `"als"` or `"rtn"`.
    """

    def __init__(
        self, shape: ExpertShape, dtype: torch.dtype, tiers: tuple[str, ...], group_size: int = 64, method: str = "als"
    ):
        self.shape, self.dtype, self.tiers, self.method = shape, dtype, tiers, method
        layout = tier_layout(shape, dtype, tiers, group_size)
        self.matrices, self.base_layout, self.upgrade_layout = layout.matrices, layout.base, layout.upgrade
        self.base, self.upgrade = layout.sizes()
        self.planes, self.refine_planes = layout.planes, layout.refine_planes
        self.replaces = tiers[-1] == "fp16" and len(tiers) > 1

    @property
    def fit_bits(self) -> int:
        """The number of bits that is fitted best; 4 for every code that has, or may get, its 4-bit reading."""
        return BITS[self.tiers[0]] if not self.refine_planes and self.planes else 4

    @property
    def coarse(self) -> bool:
        """Whether the fit looks after the 2-bit reading too: that costs range, which int8 would miss."""
        return self.tiers == ("int2", "int4")

    def encode(self, weights: ExpertWeights, inputs: Sequence[ExpertInputs] | None = None) -> Encoded:
        """Pack n experts. Nothing is checked here; see `quantizer.check_representable`.

        Args:
            inputs: of each expert, where they are known. Tiers that lead to int8 do not use them: codes that make
                up for one another cannot be made exact by more bits.
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
            used = inputs is not None and self.tiers[-1] != "int8"
            known = [getattr(of_expert, name) for of_expert in inputs or ()] if used else None
            matrix = self._oriented(getattr(weights, name))
            errors += self._encode_matrix(name, matrix, known, base_parts, upgrade_parts)
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
        up, down = (self._read_code(parts, name, planes, bits, dtype) for name in MATRICES)
        return ExpertWeights(up, down, parts.get("up.bias"), parts.get("down.bias"))

    def _oriented(self, weights: Tensor) -> Tensor:
        return weights.transpose(1, 2) if self.shape.transposed else weights

    def _encode_matrix(
        self,
        name: str,
        matrix: Tensor,
        inputs: Sequence[Inputs] | None,
        base_parts: Mapping[str, Tensor],
        upgrade_parts: Mapping[str, Tensor],
    ) -> np.ndarray:
        """Code the rows of `matrix [n, N, K]` into their parts, a slice at a time; returns errors `[n, tiers]`."""
        per_row = len(matrix) * self.matrices[name].padded
        step = max(1, CODED_AT_ONCE[matrix.is_cuda] // per_row) if inputs is None else matrix.shape[1]
        squares = []
        for first in range(0, matrix.shape[1], step):
            rows = slice(first, first + step)
            code = self._quantize(name, matrix[:, rows], inputs)
            squares.append(self._squares(name, matrix[:, rows], code))
            base_parts[f"{name}.meta"][:, :, rows].copy_(torch.stack([code.scale, code.minimum], -1).transpose(1, 2))
            self._write_planes(base_parts, name, code, self.planes, rows)
            self._write_planes(upgrade_parts, name, code, self.refine_planes, rows)
        *errors, norm = torch.cat(squares, 1).double().sum(1).unbind(-1)
        return (torch.stack(errors, 1) / norm.clamp_min(1e-30)[:, None]).cpu().numpy()

    def _quantize(self, name: str, matrix: Tensor, inputs: Sequence[Inputs] | None) -> Code:
        layout = self.matrices[name]
        if layout.padded > layout.columns:
            # Padding repeats the row, so that a group keeps the spread of the weights it really holds.
            matrix = matrix.repeat(1, 1, -(-layout.padded // layout.columns))[..., : layout.padded]
        return quantize(
            matrix, layout.group_size, self.fit_bits, self.method, not self.refine_planes, self.coarse, inputs
        )

    def _squares(self, name: str, matrix: Tensor, code: Code) -> Tensor:
        """Sums over each row, `[n, N, tiers + 1]`: squared errors of the reading at each tier, squared weights."""
        exact = matrix.float()
        errors = [
            exact.new_zeros(exact.shape[:2])
            if tier == "fp16"
            else (self._reading(name, code, BITS[tier]) - exact).square().sum(2)
            for tier in self.tiers
        ]
        return torch.stack([*errors, exact.square().sum(2)], -1)

    def _reading(self, name: str, code: Code, bits: int) -> Tensor:
        return dequantize_at(code, bits)[..., : self.matrices[name].columns]

    def _write_planes(
        self, parts: Mapping[str, Tensor], name: str, code: Code, planes: tuple[Plane, ...], rows: slice
    ) -> None:
        for plane in planes:
            bits = (code.values >> plane.shift) & (2**plane.bits - 1)
            parts[f"{name}.{plane.name}"][:, rows].copy_(pack_plane(bits, plane.bits, self.matrices[name].block))

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

    def _read_code(
        self, parts: Mapping[str, Tensor], name: str, planes: tuple[Plane, ...], bits: int, dtype: torch.dtype
    ) -> Tensor:
        layout = self.matrices[name]
        values = reduce(
            torch.bitwise_or,
            (unpack_plane(parts[f"{name}.{plane.name}"], plane.bits, layout.block) << plane.shift for plane in planes),
        )
        scale, minimum = parts[f"{name}.meta"].transpose(1, 2).unbind(-1)
        return dequantize(values, scale, minimum, bits)[..., : layout.columns].to(dtype)
