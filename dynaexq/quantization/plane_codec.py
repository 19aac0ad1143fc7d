"""Encode matrices as planes of codes with a scale and a minimum for each group, and read them back.

What is common to experts and to dense layers. It does not know what the matrices are for, nor where their planes lie.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaexq.quantization.arrangement import IN_STRIPS, ROW_BY_ROW, Arrangement
from dynaexq.quantization.grid_format import GridFormat
from dynaexq.quantization.layout import Array, BlockLayout, MatrixLayout
from dynaexq.quantization.moments import Inputs
from dynaexq.quantization.quantize import Code, dequantize, dequantize_at, quantize
from dynaexq.types import BITS

CODED_AT_ONCE = {False: 2**18, True: 2**24}
"""Weights coded together on a CPU, where the float32 copies of them should stay in cache, and on a GPU."""


class Plane(NamedTuple):
    """`bits` of every 8-bit code, starting at bit `shift`."""

    name: str
    bits: int
    shift: int


_TOP2, _MIDDLE2, _TOP4, _LOW4 = Plane("top2", 2, 6), Plane("middle2", 2, 4), Plane("top4", 4, 4), Plane("low4", 4, 0)
_THIRD1, _FOURTH1, _FIFTH2 = Plane("third1", 1, 5), Plane("fourth1", 1, 4), Plane("fifth2", 2, 2)

BASE_PLANES = {
    "int2": (_TOP2,),
    "int3": (_TOP2, _THIRD1),
    "int4": (_TOP4,),
    "int6": (_TOP4, _FIFTH2),
    "int8": (_TOP4, _LOW4),
}
REFINE_PLANES = {
    ("int2", "int3"): (_THIRD1,),
    ("int2", "int4"): (_MIDDLE2,),
    ("int2", "int8"): (_MIDDLE2, _LOW4),
    ("int3", "int4"): (_FOURTH1,),
    ("int4", "int6"): (_FIFTH2,),
    ("int4", "int8"): (_LOW4,),
}


def plane_arrays(name: str, matrix: MatrixLayout, planes: tuple[Plane, ...]) -> list[Array]:
    """The planes of a matrix, as a `BlockLayout` takes them."""
    return [(f"{name}.{plane.name}", torch.int32, matrix.words(plane.bits)) for plane in planes]


def code_arrays(name: str, matrix: MatrixLayout, planes: tuple[Plane, ...], form: type[GridFormat]) -> list[Array]:
    """The planes of a matrix and what its codes mean."""
    return [*plane_arrays(name, matrix, planes), *form.arrays(name, matrix)]


class PlaneCodec:
    """Matrices as codes at the one or two precisions of `tiers`, the base first.

    Args:
        matrices: how each is cut up, by name.
        planes, refine_planes: of the base's code, and those that an upgrade adds to it.
        method: `"als"` or `"rtn"`.
        form: how grids are stored.
        arrangement: how planes and grids lie in the blocks that it writes and reads.
    """

    def __init__(
        self,
        matrices: dict[str, MatrixLayout],
        tiers: tuple[str, ...],
        planes: tuple[Plane, ...],
        refine_planes: tuple[Plane, ...],
        method: str,
        form: type[GridFormat],
        arrangement: Arrangement = ROW_BY_ROW,
    ):
        self.matrices, self.tiers, self.method, self.arrangement = matrices, tiers, method, arrangement
        self.planes, self.refine_planes, self.form = planes, refine_planes, form

    @property
    def fit_bits(self) -> int:
        """The bits that are fitted best: where a code may be refined, those that it may get, but at most four."""
        if not self.planes:
            return 4
        return min(4, BITS[self.tiers[-1]]) if self.refine_planes else BITS[self.tiers[0]]

    @property
    def coarse_bits(self) -> int | None:
        """Those of the base, where the fit looks after them too: that costs range, which int6 and int8 would miss."""
        return BITS[self.tiers[0]] if self.refine_planes and BITS[self.tiers[-1]] <= 4 else None

    @property
    def uses_inputs(self) -> bool:
        """Whether codes depend on what is known of their inputs: not those that are refined beyond four bits, as codes
        that make up for one another cannot be made exact by more bits, nor those of 8 bits alone, which need none."""
        if self.refine_planes:
            return BITS[self.tiers[-1]] <= 4
        return self.tiers != ("int8",)

    def encode_matrix(
        self,
        name: str,
        matrix: Tensor,
        inputs: Sequence[Inputs] | None,
        base_parts: Mapping[str, Tensor],
        upgrade_parts: Mapping[str, Tensor],
    ) -> np.ndarray:
        """Code the rows of `matrix [n, N, K]` into their parts, a slice at a time; returns errors `[n, tiers]`."""
        per_row = len(matrix) * self.matrices[name].padded
        at_once = max(1, CODED_AT_ONCE[matrix.is_cuda] // per_row // IN_STRIPS.HEIGHT) * IN_STRIPS.HEIGHT
        step = at_once if inputs is None else matrix.shape[1]
        squares, form = [], self.form.of_weights(matrix)
        form.write_unit(base_parts, name)
        for first in range(0, matrix.shape[1], step):
            rows = slice(first, first + step)
            code = self._quantize(name, matrix[:, rows], inputs, form)
            squares.append(self._squares(name, matrix[:, rows], code))
            meta = form.pack((code.scale, code.minimum)).transpose(1, 2)
            self.arrangement.write_meta(base_parts[f"{name}.meta"], rows, meta)
            self._write_planes(base_parts, name, code, self.planes, rows)
            self._write_planes(upgrade_parts, name, code, self.refine_planes, rows)
        *errors, norm = torch.cat(squares, 1).double().sum(1).unbind(-1)
        return (torch.stack(errors, 1) / norm.clamp_min(1e-30)[:, None]).cpu().numpy()

    def arrange(self, layout: BlockLayout, blocks: Tensor) -> None:
        """Give what lies row by row in uint8 `blocks [n, nbytes]` this codec's own arrangement, in place."""
        if self.arrangement != ROW_BY_ROW:
            self._rearrange(layout, blocks, self.arrangement.take_plane, self.arrangement.take_meta)

    def arranged_by_rows(self, layout: BlockLayout, blocks: Tensor) -> Tensor:
        """The blocks as files have them; a copy, unless they lie like that already."""
        if self.arrangement == ROW_BY_ROW:
            return blocks
        by_rows = blocks.clone()
        self._rearrange(layout, by_rows, self.arrangement.give_plane, self.arrangement.give_meta)
        return by_rows

    def _rearrange(
        self,
        layout: BlockLayout,
        blocks: Tensor,
        of_plane: Callable[[Tensor, int, int], None],
        of_meta: Callable[[Tensor], None],
    ) -> None:
        for block in blocks.split(1):  # one by one: what is in between may be larger than they are
            parts = layout.view(block)
            for name, matrix in self.matrices.items():
                for plane in self.planes + self.refine_planes:
                    if f"{name}.{plane.name}" in parts:
                        of_plane(parts[f"{name}.{plane.name}"], plane.bits, matrix.block)
                if f"{name}.meta" in parts:
                    of_meta(parts[f"{name}.meta"])

    def read_code(
        self, parts: Mapping[str, Tensor], name: str, planes: tuple[Plane, ...], bits: int, dtype: torch.dtype
    ) -> Tensor:
        """Weights `[n, N, K]` in `dtype`, from the `planes` of their codes of so many bits."""
        layout = self.matrices[name]
        codes = (
            self.arrangement.read_plane(parts[f"{name}.{plane.name}"], plane.bits, layout.block) << plane.shift
            for plane in planes
        )
        values = reduce(torch.bitwise_or, codes)
        meta = self.arrangement.read_meta(parts[f"{name}.meta"]).transpose(1, 2)
        scale, minimum = self.form.of_parts(parts, name).unpack(meta)
        return dequantize(values, scale, minimum, bits)[..., : layout.columns].to(dtype)

    def _quantize(self, name: str, matrix: Tensor, inputs: Sequence[Inputs] | None, form: GridFormat) -> Code:
        layout = self.matrices[name]
        if layout.padded > layout.columns:
            # Padding repeats the row, so that a group keeps the spread of the weights it really holds.
            matrix = matrix.repeat(1, 1, -(-layout.padded // layout.columns))[..., : layout.padded]
        unshrink = not self.refine_planes
        options = self.method, unshrink, self.coarse_bits, inputs, form
        return quantize(matrix, layout.group_size, self.fit_bits, *options)

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
            part = parts[f"{name}.{plane.name}"]
            self.arrangement.write_plane(part, rows, bits, plane.bits, self.matrices[name].block)
