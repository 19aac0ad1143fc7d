"""Lay out the parts of a packed expert in one run of bytes. It knows shapes and offsets, not what the numbers mean.

The base block of an int4 expert with hidden size 64 and intermediate size 32, gated, in groups of 64:

    byte     0  up.top4     int32   [64, 8]      64 rows of 64 codes, 8 codes to a word
          2048  up.meta     uint8   [1, 64, 1, 2] scale and zero point of each row's one group
          2176  up.unit     float32 [1]          what the scales are counted in
          2240  down.top4   int32   [64, 8]      64 rows of 32 codes, padded to 64
          4288  down.meta   uint8   [1, 64, 1, 2]
          4416  down.unit   float32 [1]
          4608  end         a multiple of 256

Every part begins on a cache line. An upgrade slot has the missing planes only, laid out the same way: `up.low4` and
`down.low4` for int8 over int4. Where a model has biases, each follows the metadata of its matrix.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ALIGNMENT = 256  # bytes; a table entry stores address / 256 beside the kind
PART_ALIGNMENT = 64  # bytes; one cache line, four 16-byte loads
BLOCK_COLUMNS = (256, 128, 64)
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class MatrixLayout:
    """How a matrix `[rows, columns]` is cut up: K padded to blocks, groups that divide it.

    Where no block divides K, it is padded to the next multiple of 64 (K = 1408 takes blocks of 128, K = 2880 blocks
    of 64, K = 48 is padded to 64).

    >>> MatrixLayout.of(rows=768, columns=2048, group_size=64)
    MatrixLayout(rows=768, columns=2048, padded=2048, block=256, group_size=64)
    """

    rows: int
    columns: int
    padded: int
    block: int
    group_size: int

    @classmethod
    def of(cls, rows: int, columns: int, group_size: int) -> "MatrixLayout":
        padded = -(-columns // BLOCK_COLUMNS[-1]) * BLOCK_COLUMNS[-1]
        block = next(b for b in BLOCK_COLUMNS if padded % b == 0)
        group = next(g for g in GROUP_SIZES if g <= group_size and padded % g == 0)
        return cls(rows, columns, padded, block, group)

    @property
    def num_groups(self) -> int:
        return self.padded // self.group_size

    @property
    def groups_per_block(self) -> int:
        return self.block // self.group_size

    def words(self, bits: int) -> tuple[int, int]:
        """Shape of a plane of `bits`: int32 `[N, K * bits / 32]`."""
        return self.rows, self.padded * bits // 32


Array = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a part that has no place yet."""


class Part(NamedTuple):
    """One array inside a block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class BlockLayout:
    """An ordered set of parts in one contiguous, 256-byte aligned run of bytes.

    >>> block = BlockLayout([("codes", torch.int32, (2, 8)), ("scale", torch.float16, (1, 2))])
    >>> [(part.name, part.offset) for part in block.parts], block.nbytes
    ([('codes', 0), ('scale', 64)], 256)
    """

    def __init__(self, arrays: list[Array]):
        parts, end = [], 0
        for name, dtype, shape in arrays:
            part = Part(name, dtype, shape, _aligned(end, PART_ALIGNMENT))
            parts.append(part)
            end = part.offset + part.nbytes
        self.parts = tuple(parts)
        self.nbytes = _aligned(end, BLOCK_ALIGNMENT)

    def view(self, blocks: Tensor) -> dict[str, Tensor]:
        """The parts of uint8 `blocks [n, nbytes]` as typed views `[n, *shape]`; nothing is copied."""
        return {
            part.name: blocks[:, part.offset : part.offset + part.nbytes].view(part.dtype).view(-1, *part.shape)
            for part in self.parts
        }


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
