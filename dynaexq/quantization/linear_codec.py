"""One matrix as bytes, at one precision: a dense layer. See `codec` for experts."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from dynaexq.quantization.arrangement import ROW_BY_ROW, Arrangement
from dynaexq.quantization.grid_format import GRID_FORMATS
from dynaexq.quantization.layout import BlockLayout, MatrixLayout
from dynaexq.quantization.moments import Inputs
from dynaexq.quantization.plane_codec import BASE_PLANES, PlaneCodec, code_arrays
from dynaexq.types import BITS

WEIGHT = "weight"


class LinearCodec(PlaneCodec):
    """Bytes of a matrix `[rows, columns]` at `tier`, one of `BASE_PLANES`; the other arguments as in `ExpertCodec`.

    >>> LinearCodec(4096, 2048, torch.bfloat16, "int4").nbytes / (4096 * 2048)
    0.531280517578125
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        tier: str,
        group_size: int = 64,
        method: str = "als",
        scale_bits: int = 8,
        arrangement: Arrangement = ROW_BY_ROW,
    ):
        matrix, form = MatrixLayout.of(rows, columns, group_size), GRID_FORMATS[scale_bits]
        super().__init__({WEIGHT: matrix}, (tier,), BASE_PLANES[tier], (), method, form, arrangement)
        self.dtype, self.matrix = dtype, matrix
        self.layout = BlockLayout(code_arrays(WEIGHT, matrix, self.planes, form))

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def encode(self, weight: Tensor, inputs: Sequence[Inputs] | None = None) -> tuple[Tensor, float]:
        """A block `uint8 [nbytes]` on the device of `weight [rows, columns]`, and its relative squared error.

        Args:
            inputs: one, what is known of the rows that it is multiplied with, where that is known and `uses_inputs`.
        """
        block = torch.zeros(1, self.nbytes, dtype=torch.uint8, device=weight.device)
        used = inputs if self.uses_inputs else None
        errors = self.encode_matrix(WEIGHT, weight[None], used, self.layout.view(block), {})
        return block[0], float(errors[0, 0])

    def arranged(self, arrangement: Arrangement) -> "LinearCodec":
        """The same codec for blocks in another arrangement."""
        twin = copy(self)
        twin.arrangement = arrangement
        return twin

    def decode(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix `[rows, columns]` in `dtype`."""
        parts = self.layout.view(block[None])
        return self.read_code(parts, WEIGHT, self.planes, BITS[self.tiers[0]], dtype)[0]
