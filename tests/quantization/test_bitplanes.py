"""Packing: codes come back, and lie where the layout says, code by code.

B is the codes of a block, W = B * bits / 32 its words.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaexq.quantization.bitplanes import pack_plane, unpack_plane
from dynaexq.quantization.layout import BLOCK_COLUMNS

PLANES = [(bits, block) for bits in (1, 2, 4) for block in BLOCK_COLUMNS]
each_plane = pytest.mark.parametrize(("bits", "block"), PLANES)


def naive_pack(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """The module docstring of `packing`, one code at a time."""
    rows, columns = codes.shape
    width = block * bits // 32
    half_words = np.zeros((rows, columns // block, 2 * width), dtype="<u2")
    for n in range(rows):
        for k in range(columns):
            position, h = divmod(k % block, 2 * width)
            half_words[n, k // block, h] |= int(codes[n, k]) << position * bits
    return half_words.reshape(rows, -1).view("<i4")


@st.composite
def planes(draw):
    bits, block = draw(st.sampled_from(PLANES))
    rows, columns = draw(st.integers(1, 3)), block * draw(st.integers(1, 3))
    drawn = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    return np.frombuffer(drawn, np.uint8).reshape(rows, columns) & 2**bits - 1, bits, block


@given(planes())
@settings(max_examples=50)
def test_packing_follows_the_documented_layout_and_unpacking_returns_the_codes(plane):
    codes, bits, block = plane
    words = pack_plane(torch.tensor(codes), bits, block)
    assert words.dtype == torch.int32
    np.testing.assert_array_equal(words.numpy(), naive_pack(codes, bits, block))
    np.testing.assert_array_equal(unpack_plane(words, bits, block).numpy(), codes)


@each_plane
def test_word_i_plane_j_holds_the_neighbors_at_j_2w_plus_2i(bits, block):
    words = pack_plane(torch.eye(block, dtype=torch.uint8), bits, block).numpy().view(np.uint32)
    width = block * bits // 32
    expected = np.zeros((block, width), dtype=np.uint32)
    for i in range(width):
        for j in range(16 // bits):
            k = j * 2 * width + 2 * i
            expected[k, i], expected[k + 1, i] = 1 << bits * j, 1 << bits * j + 16
    np.testing.assert_array_equal(words, expected)


@each_plane
def test_one_shift_and_one_mask_or_make_a_word_two_bfloat16(bits, block):
    codes = torch.randint(0, 2**bits, (1, block), dtype=torch.uint8)
    words = pack_plane(codes, bits, block)
    mask = (2**bits - 1) * 0x0001_0001
    floats = [((words >> bits * j) & mask | 0x4300_4300).view(torch.bfloat16) for j in range(16 // bits)]
    torch.testing.assert_close(torch.cat(floats, 1).float(), 128.0 + codes, rtol=0, atol=0)


@each_plane
def test_leading_dimensions_are_packed_row_by_row(bits, block):
    codes = torch.randint(0, 2**bits, (2, 3, 2 * block), dtype=torch.uint8)
    words = pack_plane(codes, bits, block)
    assert words.shape == (2, 3, 2 * block * bits // 32)
    assert torch.equal(words[1, 2], pack_plane(codes[1, 2], bits, block))
    assert torch.equal(unpack_plane(words, bits, block), codes.to(torch.int16))
