"""Packed codes as tiles of 16-bit floats, in a shift and a mask-or for two codes. It knows neither experts nor tiers.

A code is a fraction: its bits, from the top, are put where a float's mantissa has its top bits. Under the exponent of
16 the float reads 16 + q for a 4-bit code, 16 + 4 q for a 2-bit one and 16 + q / 4 for one of 6, in steps of the 4-bit
reading whichever it is; the low nibble of an 8-bit code goes under the exponent of 1 and reads 1 + q / 16. What the
exponents add is a constant, and leaves through the group's offset. So small an exponent keeps the sums small from
which it has to leave again.

Planes lie in memory as `quantization.bitplanes` says: in the half-words of a block, *slice* j, the codes at bit
j * bits of each, is a contiguous run of columns. Products take columns in *pieces*. Where a slice has two, a block
comes in two tiles of words, and a slice is then what one tile has of it.

Shapes: R weight rows of a tile, W words of a tile a row, C = 2 W columns of a piece.
"""

import triton
import triton.language as tl


@triton.jit
def load_plane(plane, row, block, BITS: tl.constexpr, TILES: tl.constexpr, matrix: tl.constexpr):
    """Words of one block of a plane, in two tiles `[R, W]`, of which the second is the first again if `TILES` is 1."""
    WORDS: tl.constexpr = matrix.codes * BITS // 32
    TILE: tl.constexpr = WORDS // TILES
    start = plane.to(tl.pointer_type(tl.uint32)) + row[:, None] * (matrix.padded * BITS // 32) + block * WORDS
    words = start + tl.arange(0, TILE)[None, :]  # [R, W]
    first = tl.load(words)  # [R, W]
    second = first
    if TILES == 2:
        second = tl.load(words + TILE)
    return first, second


@triton.jit
def load_half_plane(plane, row, block, BITS: tl.constexpr, TILES: tl.constexpr, matrix: tl.constexpr):
    """Words of one block of a plane in the places of one of twice as many bits, in as many tiles `[R, W]` as that has.

    A slice of the wider plane is two of this one. The codes of slice j begin at bit 2 * j * BITS.
    """
    WORDS: tl.constexpr = matrix.codes * BITS // 32
    TILE: tl.constexpr = 2 * WORDS // TILES
    start = plane.to(tl.pointer_type(tl.uint32)) + row[:, None] * (matrix.padded * BITS // 32) + block * WORDS
    word = tl.arange(0, TILE)
    words = tl.load(start + (word % WORDS)[None, :])  # [R, W]
    if TILES == 2:
        return words, words >> BITS
    else:
        first = words >> (word // WORDS * BITS)[None, :]
        return first, first


@triton.jit
def merge_bits(third, fourth):
    """Two planes of one bit, in the places of one of two, as that."""
    return ((third << 1) & 0xAAAAAAAA) | (fourth & 0x55555555)  # [R, W]


@triton.jit
def merge_planes(top, middle):
    """Two 2-bit planes as the even and the odd slices of a 4-bit one; a slice keeps its columns."""
    even = ((top << 2) & 0xCCCCCCCC) | (middle & 0x33333333)  # [R, W]
    odd = (top & 0xCCCCCCCC) | ((middle >> 2) & 0x33333333)
    return even, odd


@triton.jit
def slice_bits(
    tiles, SLICE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TO: tl.constexpr
):
    """The lowest `BITS` of the `WIDTH` bits that a slice has in each half-word, from bit `TO` on; slices take turns at
    the tiles."""
    MASK: tl.constexpr = (((1 << BITS) - 1) << TO) * 0x10001
    SHIFT: tl.constexpr = SLICE // TILES * WIDTH - TO
    if SHIFT >= 0:
        return (tiles[SLICE % TILES] >> SHIFT) & MASK
    else:
        return (tiles[SLICE % TILES] << -SHIFT) & MASK


@triton.jit
def slice_fractions(
    tiles,
    below,
    SLICE: tl.constexpr,
    BITS: tl.constexpr,
    BELOW: tl.constexpr,
    TILES: tl.constexpr,
    dtype: tl.constexpr,
):
    """The codes of a slice as the topmost mantissa bits of both half-words: `BITS` of `tiles`, then `BELOW` of the
    half plane `below`."""
    LOWEST: tl.constexpr = (7 if dtype == tl.bfloat16 else 10) - BITS - BELOW
    fractions = slice_bits(tiles, SLICE, BITS, BITS, TILES, LOWEST + BELOW)  # [R, W]
    if BELOW > 0:
        fractions |= slice_bits(below, SLICE, BELOW, BITS, TILES, LOWEST)
    return fractions


@triton.jit
def piece_fractions(
    tiles,
    below,
    PIECE: tl.constexpr,
    BITS: tl.constexpr,
    BELOW: tl.constexpr,
    TILES: tl.constexpr,
    matrix: tl.constexpr,
):
    """The codes of a piece, which is a slice or, where slices have 8 columns and matrix instructions want 16, two."""
    if 2 * tiles[0].shape[1] == matrix.piece:
        return slice_fractions(tiles, below, PIECE, BITS, BELOW, TILES, matrix.dtype)
    else:
        left = slice_fractions(tiles, below, 2 * PIECE, BITS, BELOW, TILES, matrix.dtype)
        right = slice_fractions(tiles, below, 2 * PIECE + 1, BITS, BELOW, TILES, matrix.dtype)
        return tl.permute(tl.join(left, right), (0, 2, 1)).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def as_floats(fractions, POWER: tl.constexpr, dtype: tl.constexpr):
    """Floats `[R, C]` with mantissas `fractions [R, W]` under the exponent of 2 ** `POWER`."""
    EXPONENT: tl.constexpr = (127 + POWER) << 7 if dtype == tl.bfloat16 else (15 + POWER) << 10
    pairs = fractions | (EXPONENT * 0x10001)  # [R, W], two floats in each word
    low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, high).reshape(pairs.shape[0], 2 * pairs.shape[1])


@triton.jit
def load_grids(base, row, block, matrix: tl.constexpr):
    """The grids of all groups of one block, in two words `[R]`, of which the second is the first again if one holds
    them; none where they have 16 bits, which `grid_of` loads group by group."""
    if matrix.unit >= 0:
        NBYTES: tl.constexpr = 2 * matrix.codes // matrix.group
        WORD: tl.constexpr = tl.uint16 if NBYTES == 2 else tl.uint32 if NBYTES == 4 else tl.uint64
        WORDS: tl.constexpr = 2 if NBYTES == 16 else 1
        words = (base + matrix.meta).to(tl.pointer_type(WORD)) + (block * matrix.rows + row) * WORDS
        first = tl.load(words)  # [R]
        second = first
        if WORDS == 2:
            second = tl.load(words + 1)
        return first, second
    else:
        return row, row


@triton.jit
def grid_of(grids, base, row, block, GROUP: tl.constexpr, BITS: tl.constexpr, matrix: tl.constexpr):
    """(scale, offset) `[R]` of a block's group, so that a weight read at `BITS` bits is `scale * floats + offset`, in
    units of the matrix where it has one. See `quantization.grid_format`."""
    CENTER: tl.constexpr = (2 ** (8 - BITS) - 1) / 32
    ADDED: tl.constexpr = 17 if BITS == 8 else 16
    if matrix.unit >= 0:
        pair = (grids[GROUP // 4] >> (GROUP % 4 * 16)).to(tl.uint16)  # [R], scale and zero point
        scale = ((pair & 0xFF) << 5).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (pair >> 8).to(tl.float32)
        return scale, (CENTER - ADDED - zero / 16) * scale
    else:
        words = (base + matrix.meta).to(tl.pointer_type(tl.uint32)) + row
        word = tl.load(words + (block * (matrix.codes // matrix.group) + GROUP) * matrix.rows)  # [R]
        scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        minimum = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, minimum + (CENTER - ADDED) * scale
