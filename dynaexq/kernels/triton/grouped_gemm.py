"""The kernel: one matrix of every routed expert, each at its own precision, in one launch.

The grid is static: tiles of weight rows by blocks of pairs. What a block is, the table says as the kernel runs, so a
captured graph follows every later move. Each pair's output is written once, by one program: no atomics, and the same
bits every time.

Shapes: R weight rows of a tile, M pairs of a block.
"""

import triton
import triton.language as tl

from dynaexq.kernels.triton.dequant import (
    as_floats,
    grid_of,
    load_grids,
    load_half_plane,
    load_plane,
    merge_bits,
    merge_planes,
    piece_fractions,
)


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
        columns = k + tl.arange(0, tiling.block_k)  # [C]
        if matrix.transposed:
            here = weights + row[:, None] + columns[None, :] * matrix.rows  # [R, C]
        else:
            here = weights + row[:, None] * matrix.columns + columns[None, :]  # [R, C]
        if PADDED:
            tile = tl.load(here, mask=(columns < matrix.columns)[None, :], other=0.0)
        else:
            tile = tl.load(here)
        product = tl.dot(tile.to(matrix.dot), load_activations(x, x_mask, columns, PADDED, matrix), product)
    return product


@triton.jit
def load_codes(base, upgrade, row, block, DEPTH: tl.constexpr, matrix: tl.constexpr):
    """Tiles of one block of codes: their top bits, two or four, and what is below: the low four of 8-bit codes, or a
    half plane of 3-bit or 6-bit ones."""
    NIBBLES: tl.constexpr = matrix.codes // 4 // matrix.piece  # tiles of a 4-bit plane: half a slice may be a piece
    if matrix.base > 3:
        high = load_plane(base + matrix.top, row, block, 4, NIBBLES, matrix)
    else:
        high = load_plane(base + matrix.top, row, block, 2, 1, matrix)
        if DEPTH > 3:
            high = merge_planes(high[0], load_middle(base, upgrade, row, block, matrix))
    low = high
    if DEPTH == 3:
        low = load_half_plane((upgrade if matrix.base == 2 else base) + matrix.third, row, block, 1, 1, matrix)
    if DEPTH == 6:
        low = load_half_plane((upgrade if matrix.base == 4 else base) + matrix.fifth, row, block, 2, NIBBLES, matrix)
    if DEPTH == 8:
        low = load_plane((base if matrix.base == 8 else upgrade) + matrix.low, row, block, 4, NIBBLES, matrix)
    return high, low


@triton.jit
def load_middle(base, upgrade, row, block, matrix: tl.constexpr):
    """The third and fourth bits of one block of codes whose base has two or three, as one tile `[R, W]`."""
    if matrix.base == 2:
        return load_plane(upgrade + matrix.middle, row, block, 2, 1, matrix)[0]
    else:
        third = load_half_plane(base + matrix.third, row, block, 1, 1, matrix)
        fourth = load_half_plane(upgrade + matrix.fourth, row, block, 1, 1, matrix)
        return merge_bits(third[0], fourth[0])


@triton.jit
def high_floats(tiles, low, PIECE: tl.constexpr, DEPTH: tl.constexpr, matrix: tl.constexpr):
    """Floats `[R, C]` of a piece: of its codes, or of the top bits of 8-bit ones."""
    BITS: tl.constexpr = 2 if DEPTH < 4 else 4
    BELOW: tl.constexpr = 0 if DEPTH == 8 else DEPTH - BITS
    TILES: tl.constexpr = matrix.codes // 4 // matrix.piece if matrix.base > 3 else BITS // 2
    return as_floats(piece_fractions(tiles, low, PIECE, BITS, BELOW, TILES, matrix), 4, matrix.dtype)


@triton.jit
def low_floats(tiles, PIECE: tl.constexpr, matrix: tl.constexpr):
    """Floats `[R, C]` of the low nibbles of a piece."""
    TILES: tl.constexpr = matrix.codes // 4 // matrix.piece
    return as_floats(piece_fractions(tiles, tiles, PIECE, 4, 0, TILES, matrix), 0, matrix.dtype)


@triton.jit
def scaled_floats(high, low, scale, offset, PIECE: tl.constexpr, DEPTH: tl.constexpr, matrix: tl.constexpr):
    """The weights `[R, C]` that a piece's codes stand for."""
    floats = high_floats(high, low, PIECE, DEPTH, matrix).to(tl.float32)
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
    """The product `[R, M]` of rows `row` of the codes in `base` and `upgrade`, read at `DEPTH` bits, added up in
    `product`, which is zero."""
    PIECES: tl.constexpr = matrix.group // matrix.piece
    GROUPS: tl.constexpr = matrix.codes // matrix.group
    PADDED: tl.constexpr = matrix.padded > matrix.columns
    for block in tl.range(0, matrix.padded // matrix.codes, num_stages=tiling.stages):
        high, low = load_codes(base, upgrade, row, block, DEPTH, matrix)
        grids = load_grids(base, row, block, matrix)
        for g in tl.static_range(GROUPS):
            scale, offset = grid_of(grids, base, row, block, g, DEPTH, matrix)  # [R], [R]
            partial = tl.zeros_like(product)  # [R, M]
            for p in tl.static_range(g * PIECES, (g + 1) * PIECES):
                columns = block * matrix.codes + p * matrix.piece + tl.arange(0, matrix.piece)  # [C]
                activations = load_activations(x, x_mask, columns, PADDED, matrix)  # [C, M]
                if tiling.scale_first:
                    weights = scaled_floats(high, low, scale, offset, p, DEPTH, matrix)  # [R, C]
                    product = tl.dot(weights, activations, product)
                else:
                    partial = tl.dot(high_floats(high, low, p, DEPTH, matrix).to(matrix.dot), activations, partial)
                    if DEPTH == 8:  # two nibbles are too long for the mantissa of one 16-bit float
                        partial = tl.dot(low_floats(low, p, matrix).to(matrix.dot), activations, partial)
            if not tiling.scale_first:
                total = load_sum(sums, block * GROUPS + g, tiling.sum_width, matrix)  # [M]
                product += partial * scale[:, None]
                product += offset[:, None] * total[None, :]
    if matrix.unit >= 0:
        product *= tl.load((base + matrix.unit).to(tl.pointer_type(tl.float32)))
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


@triton.jit(do_not_specialize=["num_blocks"])  # it changes with the batch: one kernel must do for all
def expert_gemm(
    x,
    sums,
    output,
    output_sums,
    blocks,
    num_blocks,
    order,
    entries,
    base,
    CHOICES: tl.constexpr,
    matrix: tl.constexpr,
    tiling: tl.constexpr,
):
    """`output[pair] = W x[pair // CHOICES]`, or silu(gate) * up of it, for every pair of an expert that is here.

    Args:
        x: `[*, K]`; `sums`: float32 `[*, KP / tiling.sum_width]`, unused if weights are scaled first.
        output: `[P, N]`, or `[P, N / 2]`; `output_sums`: float32 `[P, * / tiling.next_sum_width]`, with SwiGLU only.
        blocks, order: see `routing.Routing`.
        entries: int64 `[num_experts]`, `address | kind`.
        base: uint8 `[num_experts, matrix.base_nbytes]`.
    """
    BLOCK_M: tl.constexpr = tiling.block_m
    tile, slot = tl.program_id(0), tl.program_id(1)
    expert = tl.load(blocks + slot)
    if expert < 0:
        return
    entry = tl.load(entries + expert)
    if tiling.tiers == "base":
        if entry & 0xFF != 0:
            return
    if tiling.tiers == "upgraded":
        if entry & 0xFF == 0:
            return
    here = base + expert.to(tl.int64) * matrix.base_nbytes
    # Triton loads 16 bytes at a time only from where it knows the alignment.
    upgrade = tl.multiple_of(((entry >> 8) * 256).to(tl.pointer_type(tl.uint8)), 256)

    member = tl.arange(0, BLOCK_M)  # [M]
    mask = member < tl.load(blocks + 2 * num_blocks + slot)  # [M]
    pair = tl.load(order + tl.load(blocks + num_blocks + slot) + member, mask=mask, other=0).to(tl.int64)  # [M]
    source = pair // CHOICES  # [M]
    rows = x + source * matrix.columns  # [M]
    row_sums = sums
    if tiling.sum_width > 0:
        row_sums = sums + source * (matrix.padded // tiling.sum_width)
    row = weight_rows(tile, matrix, tiling)  # [R]

    product = expert_product(entry, rows, mask, row_sums, here, upgrade, row, matrix, tiling)
    if tiling.swiglu:
        store_swiglu(product, tile, pair, mask, output, output_sums, matrix, tiling)
    else:
        store_rows(product, tile, pair, mask, output, here, row, matrix, tiling)


@triton.jit
def expert_product(entry, x, x_mask, sums, base, upgrade, row, matrix: tl.constexpr, tiling: tl.constexpr):
    """The product `[R, M]` of one expert, at the precision that its `entry` says."""
    ROWS: tl.constexpr = tiling.block_n  # Triton 3.6 makes no shapes of attributes
    PAIRS: tl.constexpr = tiling.block_m
    product = tl.zeros((ROWS, PAIRS), tl.float32)  # [R, M]
    if matrix.upgrade == 0 or tiling.tiers == "base":
        return base_product(product, x, x_mask, sums, base, row, matrix, tiling)
    elif tiling.tiers == "upgraded":
        return upgraded_product(product, x, x_mask, sums, base, upgrade, row, matrix, tiling)
    else:
        if entry & 0xFF == 0:
            product = base_product(product, x, x_mask, sums, base, row, matrix, tiling)
        else:
            product = upgraded_product(product, x, x_mask, sums, base, upgrade, row, matrix, tiling)
        return product


@triton.jit
def weight_rows(tile, matrix: tl.constexpr, tiling: tl.constexpr):
    """The weight rows `[R]` of a tile; beyond the last, the last again.

    With SwiGLU, every 8 rows of gate are followed by their 8 rows of up: a thread holds rows r and r + 8 of a matrix
    instruction's result, so gate and up meet without moving.
    """
    index = tl.arange(0, tiling.block_n)  # [R]
    if tiling.swiglu:
        HALF: tl.constexpr = matrix.rows // 2
        row = tile * (tiling.block_n // 2) + index // 16 * 8 + index % 8
        return tl.minimum(row, HALF - 1) + index // 8 % 2 * HALF
    else:
        return tl.minimum(tile * tiling.block_n + index, matrix.rows - 1)


@triton.jit
def store_swiglu(product, tile, pair, mask, output, output_sums, matrix: tl.constexpr, tiling: tl.constexpr):
    """Store silu(gate) * up `[R / 2, M]`, and the sums of the values as stored that the next product will need."""
    COLUMNS: tl.constexpr = matrix.rows // 2
    WIDTH: tl.constexpr = tiling.block_n // 2
    PAIRS: tl.constexpr = tiling.block_m
    halves = tl.permute(product.reshape(WIDTH // 8, 2, 8, PAIRS), (0, 2, 3, 1))  # [R / 16, 8, M, 2]
    gate, up = tl.split(halves.reshape(WIDTH, PAIRS, 2))  # [R / 2, M], [R / 2, M]
    hidden = (gate / (1.0 + tl.exp(-gate)) * up).to(matrix.dtype)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    inside = (column < COLUMNS)[:, None]
    tl.store(output + pair[None, :] * COLUMNS + column[:, None], hidden, mask=mask[None, :] & inside)
    if tiling.next_sum_width > 0:
        SUM: tl.constexpr = tiling.next_sum_width
        SUMS: tl.constexpr = WIDTH // SUM
        STRIDE: tl.constexpr = -(-COLUMNS // 64) * 64 // SUM
        stored = tl.where(inside, hidden.to(tl.float32), 0.0)
        total = tl.sum(stored.reshape(SUMS, SUM, PAIRS), axis=1)
        place = tile * SUMS + tl.arange(0, SUMS)
        within = (place < STRIDE)[:, None]
        tl.store(output_sums + pair[None, :] * STRIDE + place[:, None], total, mask=mask[None, :] & within)


@triton.jit
def store_rows(product, tile, pair, mask, output, base, row, matrix: tl.constexpr, tiling: tl.constexpr):
    """Store `product [R, M]`, with the bias where there is one."""
    if matrix.bias >= 0:
        bias = tl.load((base + matrix.bias).to(tl.pointer_type(matrix.dtype)) + row)
        product += bias.to(tl.float32)[:, None]
    column = tile * tiling.block_n + tl.arange(0, tiling.block_n)
    inside = mask[None, :] & (column < matrix.rows)[:, None]
    tl.store(output + pair[None, :] * matrix.rows + column[:, None], product.to(matrix.dtype), mask=inside)
