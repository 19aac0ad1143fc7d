"""How planes and scales lie in memory: row by row, as in files and on a GPU, or in strips, for the native CPU kernel.

Either takes the same bytes in the same places, part by part. It knows neither experts nor tiers. Shapes: n experts, N
rows, K columns, W words of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynaexq.quantization.bitplanes import pack_plane, unpack_plane


@dataclass(frozen=True)
class Arrangement(ABC):
    """One way; two of one kind are equal. Rows that are written together begin at a multiple of 16."""

    @abstractmethod
    def write_plane(self, part: Tensor, rows: slice, codes: Tensor, bits: int, block: int) -> None:
        """Put uint8 `codes [n, rows, K]` below `2**bits` into a plane, int32 `[n, N, W]`."""

    @abstractmethod
    def read_plane(self, part: Tensor, bits: int, block: int) -> Tensor:
        """The codes of a plane, int16 `[n, N, K]`."""

    @abstractmethod
    def write_meta(self, part: Tensor, rows: slice, meta: Tensor) -> None:
        """Put grids `[n, groups, rows, 2]` into the part of all rows, `[n, blocks, N, groups of a block, 2]`."""

    @abstractmethod
    def read_meta(self, part: Tensor) -> Tensor:
        """The grids of such a part, `[n, groups, N, 2]`."""

    @abstractmethod
    def take_plane(self, part: Tensor, bits: int, block: int) -> None:
        """Arrange a plane, int32 `[n, N, W]`, that lies row by row, in place."""

    @abstractmethod
    def give_plane(self, part: Tensor, bits: int, block: int) -> None:
        """Undo `take_plane`."""

    @abstractmethod
    def take_meta(self, part: Tensor) -> None:
        """Arrange the grids of such a part, which lie row by row, in place."""

    @abstractmethod
    def give_meta(self, part: Tensor) -> None:
        """Undo `take_meta`."""


@dataclass(frozen=True)
class RowByRow(Arrangement):
    """Each row by itself, as `bitplanes` has it; the two numbers of a grid side by side."""

    def write_plane(self, part: Tensor, rows: slice, codes: Tensor, bits: int, block: int) -> None:
        part[:, rows].copy_(pack_plane(codes, bits, block))

    def read_plane(self, part: Tensor, bits: int, block: int) -> Tensor:
        return unpack_plane(part, bits, block)

    def write_meta(self, part: Tensor, rows: slice, meta: Tensor) -> None:
        part[:, :, rows].copy_(meta.unflatten(1, (part.shape[1], -1)).transpose(2, 3))

    def read_meta(self, part: Tensor) -> Tensor:
        return part.transpose(2, 3).flatten(1, 2)

    def take_plane(self, part: Tensor, bits: int, block: int) -> None:
        pass

    def give_plane(self, part: Tensor, bits: int, block: int) -> None:
        pass

    def take_meta(self, part: Tensor) -> None:
        pass

    def give_meta(self, part: Tensor) -> None:
        pass


@dataclass(frozen=True)
class InStrips(Arrangement):
    """16 rows side by side, so that a vector register has a row in each lane.

    A word of a plane has the codes of one row in 8 neighboring columns (4 bits), 16 (2 bits) or 32 (1 bit): byte j has
    that of column j in its lowest bits, then that of column 4 + j, and so on; but of 1 bit, columns 8 to 15 change
    places with columns 16 to 23, so that one shift puts a bit of each of two codes under two others of it. The words
    of the rows of a strip follow one another, column by column. Of grids, each strip has, group by group, the scales
    of its rows and then their other numbers. The last strip has the rows that are left. A strip takes the bytes that
    its rows would take alone.
    """

    HEIGHT: ClassVar = 16

    def write_plane(self, part: Tensor, rows: slice, codes: Tensor, bits: int, block: int) -> None:
        count, height, _ = codes.shape
        fours = codes.contiguous().view(torch.int32).view(count, height, -1, 8 // bits)  # [n, rows, W, fields]
        words = fours[..., 0].clone()
        for field in range(1, 8 // bits):
            words |= fours[..., field] << self._place(field, bits)
        self._write(part[:, rows], words)

    def read_plane(self, part: Tensor, bits: int, block: int) -> Tensor:
        words, mask = self._read(part), 0x01010101 * (2**bits - 1)
        fours = torch.stack([(words >> self._place(field, bits)) & mask for field in range(8 // bits)], -1)
        return fours.view(torch.uint8).view(*part.shape[:2], -1).to(torch.int16)

    def write_meta(self, part: Tensor, rows: slice, meta: Tensor) -> None:
        self._write(self._by_rows(part)[:, rows], meta.transpose(1, 2).flatten(2))

    def read_meta(self, part: Tensor) -> Tensor:
        return self._read(self._by_rows(part)).unflatten(2, (-1, 2)).transpose(1, 2)

    def take_plane(self, part: Tensor, bits: int, block: int) -> None:
        self.write_plane(part, slice(None), ROW_BY_ROW.read_plane(part, bits, block).to(torch.uint8), bits, block)

    def give_plane(self, part: Tensor, bits: int, block: int) -> None:
        ROW_BY_ROW.write_plane(part, slice(None), self.read_plane(part, bits, block).to(torch.uint8), bits, block)

    def take_meta(self, part: Tensor) -> None:
        self.write_meta(part, slice(None), ROW_BY_ROW.read_meta(part).clone())

    def give_meta(self, part: Tensor) -> None:
        ROW_BY_ROW.write_meta(part, slice(None), self.read_meta(part))

    @staticmethod
    def _place(field: int, bits: int) -> int:
        """The lowest bit of the codes of columns 4 * field and on in each byte."""
        return (0, 1, 4, 5, 2, 3, 6, 7)[field] if bits == 1 else bits * field

    @staticmethod
    def _by_rows(part: Tensor) -> Tensor:
        return part.view(len(part), part.shape[2], -1)

    def _write(self, to: Tensor, rows: Tensor) -> None:
        """Put `rows [n, N, W]` into `to` of the same shape, strip by strip."""
        for run, height in self._runs(to.shape[1]):
            strips = rows[:, run].unflatten(1, (-1, height)).transpose(2, 3)
            to[:, run].unflatten(1, (-1, height)).copy_(strips.reshape(*strips.shape[:2], height, -1))

    def _read(self, part: Tensor) -> Tensor:
        """What `_write` was given."""
        strips = [
            part[:, run].reshape(len(part), -1, part.shape[2], height).transpose(2, 3).flatten(1, 2)
            for run, height in self._runs(part.shape[1])
        ]
        return torch.cat(strips, 1)

    def _runs(self, rows: int) -> Iterator[tuple[slice, int]]:
        """The rows of whole strips and those that are left, each with the height of its strips."""
        whole = rows // self.HEIGHT * self.HEIGHT
        if whole:
            yield slice(0, whole), self.HEIGHT
        if rows > whole:
            yield slice(whole, rows), rows - whole


ROW_BY_ROW, IN_STRIPS = RowByRow(), InStrips()
