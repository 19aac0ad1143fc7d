"""Either way for planes to lie takes the same bytes, holds the same codes, and becomes the other and itself again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynaexq.kernels import cpu
from dynaexq.quantization import IN_STRIPS, ROW_BY_ROW
from dynaexq.quantization.arrangement import InStrips
from dynaexq.quantization.layout import MatrixLayout

BOTH = (ROW_BY_ROW, IN_STRIPS)
native = cpu.arrangement(torch.float32)
STRIPS = (IN_STRIPS, native) if isinstance(native, InStrips) else (IN_STRIPS,)


def plane(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Room for a plane of two experts, random codes, and the columns of a block."""
    layout = MatrixLayout.of(rows, columns, 64)
    codes = torch.randint(0, 2**bits, (2, rows, layout.padded), dtype=torch.uint8)
    return torch.zeros(2, *layout.words(bits), dtype=torch.int32), codes, layout.block


sizes = given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([1, 2, 4]))


@sizes
def test_codes_come_back_and_what_lies_by_rows_is_taken_and_given_back(rows, columns, bits):
    part, codes, block = plane(rows, columns, bits)
    ROW_BY_ROW.write_plane(part, slice(0, rows), codes, bits, block)
    for strips in STRIPS:
        taken, written = part.clone(), part.clone()
        strips.take_plane(taken, bits, block)
        strips.write_plane(written, slice(0, rows), codes, bits, block)
        assert torch.equal(taken, written)
        assert torch.equal(strips.read_plane(taken, bits, block), codes.to(torch.int16))
        strips.give_plane(taken, bits, block)
        assert torch.equal(taken, part)


@given(
    st.integers(1, 70), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.sampled_from([torch.float16, torch.uint8])
)
def test_grids_come_back(rows, blocks, groups_per_block, dtype):
    meta = torch.randint(0, 256, (2, blocks * groups_per_block, rows, 2)).to(dtype)
    by_rows = torch.zeros(2, blocks, rows, groups_per_block, 2, dtype=dtype)
    ROW_BY_ROW.write_meta(by_rows, slice(0, rows), meta)
    assert torch.equal(ROW_BY_ROW.read_meta(by_rows), meta)
    assert torch.equal(by_rows[1, -1, -1], meta[1, -groups_per_block:, -1]), "those of a row in a block lie together"
    for strips in STRIPS:
        taken, written = by_rows.clone(), torch.zeros_like(by_rows)
        strips.take_meta(taken)
        strips.write_meta(written, slice(0, rows), meta)
        assert torch.equal(taken, written)
        assert torch.equal(strips.read_meta(taken), meta)
        strips.give_meta(taken)
        assert torch.equal(taken, by_rows)


@pytest.mark.parametrize("arrangement", BOTH)
def test_rows_may_be_written_a_few_strips_at_a_time(arrangement):
    part, codes, block = plane(70, 128, 4)
    meta = torch.rand(2, 2, 70, 2).half()
    whole, at_once, scales = torch.zeros_like(part), torch.zeros_like(part), torch.zeros(2, 2, 1, 70, 2, 2).half()
    arrangement.write_plane(whole, slice(0, 70), codes, 4, block)
    arrangement.write_meta(scales[1], slice(0, 70), meta)
    for rows in (slice(0, 32), slice(32, 64), slice(64, 96)):
        arrangement.write_plane(at_once, rows, codes[:, rows], 4, block)
        arrangement.write_meta(scales[0], rows, meta[:, :, rows])
    assert torch.equal(whole, at_once)
    assert torch.equal(*scales)


@pytest.mark.parametrize(("bits", "columns"), [(4, 8), (2, 16)])
def test_a_word_of_a_strip_has_a_row_and_its_bytes_have_every_fourth_column(bits, columns):
    rows, groups = 35, 64 // columns
    part, codes, block = plane(rows, 64, bits)
    IN_STRIPS.write_plane(part, slice(0, rows), codes, bits, block)
    flat, at = part[1].flatten().view(torch.uint8).view(-1, 4), 0
    for first in range(0, rows, 16):
        height = min(16, rows - first)
        for unit in range(groups):
            for row in range(first, first + height):
                for byte in range(4):
                    fields = (int(flat[at, byte]) >> torch.arange(0, 8, bits)) % 2**bits
                    assert torch.equal(fields, codes[1, row, unit * columns + byte :: 4][: 8 // bits].long())
                at += 1


def test_a_strip_has_scales_then_minima_group_by_group():
    meta = torch.arange(2 * 3 * 20 * 2).view(2, 3, 20, 2).half()
    part = torch.zeros(2, 3, 20, 1, 2).half()
    IN_STRIPS.write_meta(part, slice(0, 20), meta)
    flat = part[1].flatten()
    assert torch.equal(flat[: 3 * 32].view(3, 2, 16), meta[1, :, :16].transpose(1, 2))
    assert torch.equal(flat[3 * 32 :].view(3, 2, 4), meta[1, :, 16:].transpose(1, 2))
