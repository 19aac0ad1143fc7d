"""What the kernels are compiled for: where the parts of a matrix lie, and how its product is cut into tiles.

Both records are compile-time constants of the kernels. Triton recognizes a compiled kernel by the source of its
functions and by what its constants print, so everything that matters is a field; nothing is computed on the way.
"""

from dataclasses import dataclass

import triton.language as tl

from dynaexq.quantization import ExpertCodec, LinearCodec
from dynaexq.quantization.layout import MatrixLayout
from dynaexq.quantization.linear_codec import WEIGHT
from dynaexq.types import BITS


@dataclass(frozen=True)
class Matrix:
    """One matrix `[N, K]` of an expert, as it lies in the base block and in the upgrade.

    Attributes:
        base, upgrade: bits of a weight in the two tiers; 0 where there is no upgrade.
        top: offset in the base block of the plane with a code's top bits, two or four.
        middle: offset in the upgrade of the two bits below, where the base has but two.
        third: offset of the bit below two, in the base block if the base is int3, else in the upgrade.
        fourth: offset in the upgrade of the bit below three, where the base has three.
        fifth: offset of the two bits below four, in the base block if the base is int6, else in the upgrade.
        low: offset of an 8-bit code's low nibble, in the base block if the base is int8, else in the upgrade.
        meta: offset in the base block of scales and zero points, or minima.
        unit: offset in the base block of what scales of 8 bits are counted in; -1 where they have 16.
        dense: offset of the 16-bit weights, in the base block if the base is 16-bit, else in the upgrade.
        bias: offset of the bias in the base block, or -1.
        codes: columns of one block of codes.
        piece: columns that a product takes at a time; they belong to one group, and at least 16 to one slice or two.
        dot: operands of matrix instructions; the dtype itself, but float32 in Triton's interpreter, which multiplies
            the bit patterns of bfloat16.
    """

    rows: int
    columns: int
    padded: int
    transposed: bool
    base: int
    upgrade: int
    base_nbytes: int
    top: int
    middle: int
    third: int
    fourth: int
    fifth: int
    low: int
    meta: int
    unit: int
    dense: int
    bias: int
    codes: int
    group: int
    piece: int
    dtype: tl.dtype
    dot: tl.dtype

    @classmethod
    def of(cls, codec: ExpertCodec, name: str, dtype: tl.dtype, dot: tl.dtype) -> "Matrix":
        """Matrix `name` of `codec`, `"up"` or `"down"`."""
        base = {part.name: part.offset for part in codec.base_layout.parts}
        upgrade = {part.name: part.offset for part in codec.upgrade_layout.parts} if codec.upgrade else {}
        bits = BITS[codec.tiers[0]], codec.upgrade.bits if codec.upgrade else 0
        offsets = upgrade | base  # a plane is in one of them; a bias is the same in both
        sizes = codec.matrices[name], codec.base.nbytes, codec.shape.transposed
        return cls._of(name, *sizes, *bits, offsets, dtype, dot)

    @classmethod
    def of_linear(cls, codec: LinearCodec, dtype: tl.dtype, dot: tl.dtype) -> "Matrix":
        """The one matrix of `codec`."""
        offsets = {part.name: part.offset for part in codec.layout.parts}
        return cls._of(WEIGHT, codec.matrix, codec.nbytes, False, BITS[codec.tiers[0]], 0, offsets, dtype, dot)

    @classmethod
    def _of(
        cls,
        name: str,
        layout: MatrixLayout,
        base_nbytes: int,
        transposed: bool,
        base: int,
        upgrade: int,
        offsets: dict[str, int],
        dtype: tl.dtype,
        dot: tl.dtype,
    ) -> "Matrix":
        narrowest = 2 if base < 4 else 4
        return cls(
            rows=layout.rows,
            columns=layout.columns,
            padded=layout.padded,
            transposed=transposed,
            base=base,
            upgrade=upgrade,
            base_nbytes=base_nbytes,
            top=offsets.get(f"{name}.top2", offsets.get(f"{name}.top4", 0)),
            middle=offsets.get(f"{name}.middle2", 0),
            third=offsets.get(f"{name}.third1", 0),
            fourth=offsets.get(f"{name}.fourth1", 0),
            fifth=offsets.get(f"{name}.fifth2", 0),
            low=offsets.get(f"{name}.low4", 0),
            meta=offsets.get(f"{name}.meta", 0),
            unit=offsets.get(f"{name}.unit", -1),
            dense=offsets.get(f"{name}.weight", 0),
            bias=offsets.get(f"{name}.bias", -1),
            codes=layout.block,
            group=layout.group_size,
            piece=max(16, min(layout.block * narrowest // 16, layout.group_size)),
            dtype=dtype,
            dot=dot,
        )


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up, and which of an expert's tiers it is for.

    Attributes:
        block_m: pairs of one expert that a tile takes.
        block_n: weight rows of a tile.
        block_k: columns of 16-bit weights at a time.
        tiers: `"all"`, told apart expert by expert as the kernel runs, or only `"base"` or `"upgraded"` experts.
        swiglu: half of a tile's rows are of gate, half of up; silu(gate) * up is stored.
        stages: blocks of codes that are on their way or being multiplied, each with all that belongs to it.
        scale_first: weights are scaled before the product (many pairs), not each group's product after it (few).
        sum_width, next_sum_width: columns that each given sum of activations covers, and each that is stored with
            silu(gate) * up for the next product; for scaling afterwards.
    """

    block_m: int
    block_n: int
    block_k: int
    tiers: str
    swiglu: bool
    stages: int
    scale_first: bool
    sum_width: int
    next_sum_width: int
