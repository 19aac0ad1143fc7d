"""How grids, the scale and minimum of each group of weights, are stored: in 8 bits each, or in 16.

In 16 bits both are float16, as all were in the first version of packed checkpoints. In 8 bits a scale is eight bits of
a float16, the lowest three of its exponent and the topmost five of its mantissa, in units that its matrix has; the
minimum is minus a whole number of sixteenths of the scale. That number is the *zero point*: the 8-bit code that stands
for zero. So the grid of a group costs 16 bits instead of 32, a scale is off by a 64th at most, and a grid cannot lie
on one side of zero. What that costs is in docs/log.md.

A float16 has its own smaller numbers where the exponent ends, so scales down to 2**-13 of the largest are still told
apart. Units are powers of two: what scales are is exact in float32.

In memory the grids of a row in one block of codes lie together where they have 8 bits, so that a GPU takes them in one
load; those of 16 bits come group by group.

Shapes: n matrices `[N, K]`, whose grids are `[n, ...]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dynaexq.quantization.layout import Array, MatrixLayout

Grid = tuple[Tensor, Tensor]
"""Scale and minimum, float32, as they are stored."""

LARGEST_BYTE = 255
_SHIFT = 5  # bits of a float16's mantissa that a byte lacks
_LARGEST_UNITS = 1.96875 * 2.0**-8  # what the largest byte stands for
_STEPS_OF_RANGE = 12  # the scale of a 2-bit code is a twelfth of its range; that of others is less
_ROOM = 1.25  # by which fitted scales may exceed those of the range: error feedback and stretching lengthen weights


class GridFormat(ABC):
    """The grids of n matrices in one of the two forms.

    Attributes:
        bits: of a scale, and of a minimum.
        reaches_zero: whether every grid must reach from zero or below to zero or above.
        slack: by what a scale may come out smaller than it was wanted, as a factor.
    """

    bits: ClassVar[int]
    reaches_zero: ClassVar[bool]
    slack: ClassVar[float]

    @staticmethod
    @abstractmethod
    def arrays(name: str, matrix: MatrixLayout) -> list[Array]:
        """What a matrix has beside its codes, as a `BlockLayout` takes it; the first is `[blocks, N, groups, 2]`."""

    @classmethod
    @abstractmethod
    def of_weights(cls, weights: Tensor) -> "GridFormat":
        """For grids that are to be fitted to `weights [n, N, K]`."""

    @classmethod
    @abstractmethod
    def of_parts(cls, parts: Mapping[str, Tensor], name: str) -> "GridFormat":
        """For grids that lie in `parts`, of matrices `name`."""

    @abstractmethod
    def rounded(self, scale: Tensor, value: Tensor, level: Tensor | float) -> Grid:
        """The grid of `scale` on which `level` stands for `value`, as it will be stored."""

    @abstractmethod
    def pack(self, grid: Grid) -> Tensor:
        """A rounded grid `[n, ...]` twice, as the two numbers `[n, ..., 2]` that are stored."""

    @abstractmethod
    def unpack(self, meta: Tensor) -> Grid:
        """The grid that `pack` was given."""

    def write_unit(self, parts: Mapping[str, Tensor], name: str) -> None:  # noqa: B027
        """Put what belongs to a matrix as a whole into its parts."""


class HalfGrids(GridFormat):
    """Two float16."""

    bits, reaches_zero, slack = 16, False, 1.0

    @staticmethod
    def arrays(name: str, matrix: MatrixLayout) -> list[Array]:
        return [(f"{name}.meta", torch.float16, (matrix.num_groups, matrix.rows, 1, 2))]

    @classmethod
    def of_weights(cls, weights: Tensor) -> "HalfGrids":
        return cls()

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], name: str) -> "HalfGrids":
        return cls()

    def rounded(self, scale: Tensor, value: Tensor, level: Tensor | float) -> Grid:
        scale = scale.half().float()
        return scale, (value - scale * level).half().float()

    def pack(self, grid: Grid) -> Tensor:
        return torch.stack(grid, -1).half()

    def unpack(self, meta: Tensor) -> Grid:
        scale, minimum = meta.float().unbind(-1)
        return scale, minimum


class ByteGrids(GridFormat):
    """Two bytes, and a unit for each matrix.

    Args:
        unit: float32 `[n]`, powers of two.
    """

    bits, reaches_zero, slack = 8, True, 1 + 2.0**-6

    def __init__(self, unit: Tensor):
        self._unit = unit

    @staticmethod
    def arrays(name: str, matrix: MatrixLayout) -> list[Array]:
        return [
            (f"{name}.meta", torch.uint8, (matrix.padded // matrix.block, matrix.rows, matrix.groups_per_block, 2)),
            (f"{name}.unit", torch.float32, (1,)),
        ]

    @classmethod
    def of_weights(cls, weights: Tensor) -> "ByteGrids":
        low, high = weights.flatten(1).float().aminmax(dim=1)
        largest = (high.clamp_min(0) - low.clamp_max(0)) * (_ROOM / _STEPS_OF_RANGE / _LARGEST_UNITS)
        return cls(torch.exp2(largest.clamp_min(2.0**-100).log2().ceil()))

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], name: str) -> "ByteGrids":
        return cls(parts[f"{name}.unit"][:, 0])

    def rounded(self, scale: Tensor, value: Tensor, level: Tensor | float) -> Grid:
        stored = self._scale(self._byte(scale))
        zero = ((stored * level - value) * 16 / stored.clamp_min(1e-38)).round_().clamp_(0, LARGEST_BYTE)
        return stored, stored * zero / -16

    def pack(self, grid: Grid) -> Tensor:
        scale, minimum = grid
        zero = (minimum * -16 / scale.clamp_min(1e-38)).round_()
        return torch.stack([self._byte(scale), zero], -1).to(torch.uint8)

    def unpack(self, meta: Tensor) -> Grid:
        byte, zero = meta.unbind(-1)
        scale = self._scale(byte)
        return scale, scale * zero / -16

    def write_unit(self, parts: Mapping[str, Tensor], name: str) -> None:
        parts[f"{name}.unit"].copy_(self._unit[:, None])

    def _byte(self, scale: Tensor) -> Tensor:
        """The nearest byte, int16; no scale becomes zero that is not."""
        halves = (scale / self._per_matrix(scale)).clamp(0, _LARGEST_UNITS).half().view(torch.int16)
        return ((halves + (1 << _SHIFT >> 1)) >> _SHIFT).clamp_(max=LARGEST_BYTE).maximum((scale > 0).to(torch.int16))

    def _scale(self, byte: Tensor) -> Tensor:
        return (byte.to(torch.int16) << _SHIFT).view(torch.float16).float() * self._per_matrix(byte)

    def _per_matrix(self, grid: Tensor) -> Tensor:
        return self._unit.view(-1, *[1] * (grid.ndim - 1))


GRID_FORMATS: dict[int, type[GridFormat]] = {8: ByteGrids, 16: HalfGrids}
"""By the bits of a scale."""
