"""Product of a tile of an expert's weights with a block of activations, for each way a weight can be stored.

Operands are swapped, `W x^T`, so that the few rows of decoding are the narrow side of the matrix instructions.

Shapes: R weight rows of a tile, M activation rows of a block, C columns of a step or of a piece of codes.
"""

import triton
import triton.language as tl

from dynaexq.kernels.triton.dequant import as_floats, load_plane, load_scales, merge_planes, piece_fractions


@triton.jit
def load_activations(x, x_mask, columns, PADDED: tl.constexpr, matrix: tl.constexpr):
    """Activations `[C, M]` at `columns` of the rows that begin at `x [M]`; zero in padding."""
    mask = x_mask[:, None]
    if PADDED:
        mask = mask & (columns < matrix.columns)[None, :]
    return tl.load(x[:, None] + columns[None, :], mask=mask, other=0.0).T.to(matrix.dot)


@triton.jit
def dense_product(product, x, x_mask, block, row, matrix: tl.constexpr, tiling: tl.constexpr):
    """`product [R, M]` plus that of rows `row` of the 16-bit weights in `block`."""
    PADDED: tl.constexpr = matrix.columns % tiling.block_k != 0
    weights = (block + matrix.dense).to(tl.pointer_type(matrix.dtype))
    for k in tl.range(0, matrix.columns, tiling.block_k):
        columns = k + tl.arange(0, tiling.block_k)
        if matrix.transposed:
            here = weights + row[:, None] + columns[None, :] * matrix.rows
        else:
            here = weights + row[:, None] * matrix.columns + columns[None, :]
        if PADDED:
            tile = tl.load(here, mask=(columns < matrix.columns)[None, :], other=0.0)
        else:
            tile = tl.load(here)
        product = tl.dot(tile.to(matrix.dot), load_activations(x, x_mask, columns, PADDED, matrix), product)
    return product


@triton.jit
def load_codes(base, upgrade, row, block, DEPTH: tl.constexpr, matrix: tl.constexpr):
    """Tiles of one block of codes: their top bits, four or as many as there are, and the low four of 8-bit codes."""
    NIBBLES: tl.constexpr = matrix.codes // 4 // matrix.piece  # tiles of a 4-bit plane: half a slice may be a piece
    if matrix.base != 2:
        high = load_plane(base + matrix.high, row, block, 4, NIBBLES, matrix)
    else:
        high = load_plane(base + matrix.high, row, block, 2, 1, matrix)
        if DEPTH > 2:
            middle = load_plane(upgrade + matrix.middle, row, block, 2, 1, matrix)
            high = merge_planes(high[0], middle[0])
    low = high
    if DEPTH == 8:
        if matrix.base == 8:
            low = load_plane(base + matrix.low, row, block, 4, NIBBLES, matrix)
        else:
            low = load_plane(upgrade + matrix.low, row, block, 4, NIBBLES, matrix)
    return high, low


@triton.jit
def high_floats(tiles, PIECE: tl.constexpr, DEPTH: tl.constexpr, matrix: tl.constexpr):
    """Floats `[R, C]` of the top bits of a piece."""
    BITS: tl.constexpr = min(DEPTH, 4)
    TILES: tl.constexpr = matrix.codes // 4 // matrix.piece if matrix.base != 2 else BITS // 2
    return as_floats(piece_fractions(tiles, PIECE, BITS, TILES, matrix), 4, matrix.dtype)


@triton.jit
def low_floats(tiles, PIECE: tl.constexpr, matrix: tl.constexpr):
    """Floats `[R, C]` of the low nibbles of a piece."""
    return as_floats(piece_fractions(tiles, PIECE, 4, matrix.codes // 4 // matrix.piece, matrix), 0, matrix.dtype)


@triton.jit
def scaled_floats(high, low, scale, offset, PIECE: tl.constexpr, DEPTH: tl.constexpr, matrix: tl.constexpr):
    """The weights `[R, C]` that a piece's codes stand for."""
    floats = high_floats(high, PIECE, DEPTH, matrix).to(tl.float32)
    if DEPTH == 8:
        floats += low_floats(low, PIECE, matrix).to(tl.float32)
    return (floats * scale[:, None] + offset[:, None]).to(matrix.dot)


@triton.jit
def load_sum(sums, group, WIDTH: tl.constexpr, matrix: tl.constexpr):
    """Sum `[M]` of the activations that meet `group`."""
    PARTS: tl.constexpr = matrix.group // WIDTH
    total = tl.load(sums + group * PARTS)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sums + group * PARTS + part)
    return total


@triton.jit
def coded_product(
    product, x, x_mask, sums, base, upgrade, row, DEPTH: tl.constexpr, matrix: tl.constexpr, tiling: tl.constexpr
):
    """`product [R, M]` plus that of rows `row` of the codes in `base` and `upgrade`, read at `DEPTH` bits."""
    PIECES: tl.constexpr = matrix.group // matrix.piece
    GROUPS: tl.constexpr = matrix.codes // matrix.group
    PADDED: tl.constexpr = matrix.padded > matrix.columns
    meta = (base + matrix.meta).to(tl.pointer_type(tl.uint32)) + row
    for block in tl.range(0, matrix.padded // matrix.codes):
        high, low = load_codes(base, upgrade, row, block, DEPTH, matrix)
        for g in tl.static_range(GROUPS):
            scale, offset = load_scales(meta + (block * GROUPS + g) * matrix.rows, DEPTH)
            partial = tl.zeros_like(product)
            for p in tl.static_range(g * PIECES, (g + 1) * PIECES):
                columns = block * matrix.codes + p * matrix.piece + tl.arange(0, matrix.piece)
                activations = load_activations(x, x_mask, columns, PADDED, matrix)
                if tiling.scale_first:
                    weights = scaled_floats(high, low, scale, offset, p, DEPTH, matrix)
                    product = tl.dot(weights, activations, product)
                else:
                    partial = tl.dot(high_floats(high, p, DEPTH, matrix).to(matrix.dot), activations, partial)
                    if DEPTH == 8:  # two nibbles are too long for the mantissa of one 16-bit float
                        partial = tl.dot(low_floats(low, p, matrix).to(matrix.dot), activations, partial)
            if not tiling.scale_first:
                total = load_sum(sums, block * GROUPS + g, tiling.sum_width, matrix)
                product += partial * scale[:, None]
                product += offset[:, None] * total[None, :]
    return product


@triton.jit
def base_product(product, x, x_mask, sums, base, row, matrix: tl.constexpr, tiling: tl.constexpr):
    """`product [R, M]` plus that of an expert without its upgrade."""
    if matrix.base == 16:
        return dense_product(product, x, x_mask, base, row, matrix, tiling)
    else:
        return coded_product(product, x, x_mask, sums, base, base, row, matrix.base, matrix, tiling)


@triton.jit
def upgraded_product(product, x, x_mask, sums, base, upgrade, row, matrix: tl.constexpr, tiling: tl.constexpr):
    """`product [R, M]` plus that of an expert with its upgrade."""
    if matrix.upgrade == 16:
        return dense_product(product, x, x_mask, upgrade, row, matrix, tiling)
    else:
        return coded_product(product, x, x_mask, sums, base, upgrade, row, matrix.upgrade, matrix, tiling)
