"""Grids in 8 bits: what is rounded is what is stored, near what was wanted, and no worse than it must be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynaexq.quantization import LinearCodec
from dynaexq.quantization.grid_format import GRID_FORMATS, ByteGrids, HalfGrids
from dynaexq.quantization.quantize import dequantize_at, quantize

UNIT = torch.tensor([2.0**-3, 2.0**7])
ALL_BYTES = torch.arange(256, dtype=torch.uint8)

positive = st.floats(2.0**-20, 2.0**9, width=32)
any_value = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(positive, any_value), min_size=1, max_size=20), st.sampled_from([0.5, 7.97, 15.0]))
@pytest.mark.parametrize("form", [HalfGrids(), ByteGrids(UNIT)], ids=["16", "8"])
def test_a_rounded_grid_comes_back_bit_for_bit(form, wanted, level):
    scale, value = (torch.tensor([part, part]) for part in zip(*wanted, strict=True))
    grid = form.rounded(scale, value, level)
    assert all(map(torch.equal, form.unpack(form.pack(grid)), grid))
    assert all(map(torch.equal, form.rounded(grid[0], grid[1] + grid[0] * level, level), grid))


def test_every_pair_of_bytes_means_a_grid_of_its_own():
    meta = torch.stack(torch.meshgrid(ALL_BYTES, ALL_BYTES, indexing="ij"), -1)[None].expand(2, -1, -1, -1)
    scale, minimum = ByteGrids(UNIT).unpack(meta)
    assert (scale[:, 1:, 0] > scale[:, :-1, 0]).all()
    assert torch.equal(minimum, -scale * ALL_BYTES / 16)
    assert torch.equal(ByteGrids(UNIT).pack((scale, minimum))[:, 1:], meta[:, 1:])


@given(st.lists(st.floats(2.0**-6, 1.0, width=32), min_size=1, max_size=20), st.integers(0, 1))
def test_a_scale_is_off_by_a_64th_at_most(shares, matrix):
    largest = UNIT[matrix] * 2.0**-8 * 1.96875
    wanted = torch.tensor([shares, shares]) * largest
    found, _ = ByteGrids(UNIT).rounded(wanted, torch.zeros(()), 8.0)
    assert ((found - wanted).abs()[matrix] <= wanted[matrix] / 64 * 1.01).all()


def test_no_scale_becomes_zero_that_is_not():
    found, _ = ByteGrids(UNIT).rounded(torch.full((2, 3), 1e-30), torch.zeros(()), 8.0)
    assert (found > 0).all()
    assert not ByteGrids(UNIT).rounded(torch.zeros(2, 3), torch.zeros(()), 8.0)[0].any()


@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 0.02, 1.0, 3e4])
def test_units_fit_the_largest_range_with_some_room(magnitude):
    weights = torch.randn(3, 8, 64).clamp(-3, 3) / 3 * magnitude
    form = ByteGrids.of_weights(weights)
    largest = (weights.flatten(1).amax(1) - weights.flatten(1).amin(1)) / 12
    found, _ = form.rounded(largest[:, None], torch.zeros(()), 8.0)
    assert torch.allclose(found[:, 0], largest, rtol=1 / 64)
    assert torch.allclose(
        form.rounded(1.2 * largest[:, None], torch.zeros(()), 8.0)[0][:, 0], 1.2 * largest, rtol=1 / 64
    )


@pytest.mark.parametrize("method", ["rtn", "als"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 1.0, 40.0])
def test_a_group_errs_by_little_more_than_half_a_step_of_its_range_and_zero(bits, method, shift):
    """Where all weights lie on one side of zero, the grid has to reach them from there."""
    weights = (torch.randn(1, 32, 128) + shift) * 0.02
    code = quantize(weights, 64, bits, method, form=ByteGrids.of_weights(weights))
    low, high = weights.unflatten(2, (-1, 64)).aminmax(dim=-1)
    step = (high.clamp_min(0) - low.clamp_max(0)) / (2**bits - 1)
    errors = (dequantize_at(code, bits) - weights).unflatten(2, (-1, 64))
    # By a 64th each: what the scale is rounded to, what it was lengthened by; and half a 16th of a scale.
    allowed = step * (0.5 + 2**bits / 32 + 2.0 ** (3 - bits))
    assert (errors.square().mean(-1).sqrt() <= allowed).all()


@pytest.mark.parametrize(("bits", "tier"), [(4, "int4"), (8, "int8")])
def test_it_costs_a_few_hundredths_of_the_error_and_half_the_bytes(bits, tier):
    weights = torch.randn(256, 512) * 0.02
    small, large = (LinearCodec(256, 512, torch.float32, tier, scale_bits=b).encode(weights)[1] for b in GRID_FORMATS)
    assert small < {4: 1.04, 8: 1.25}[bits] * large


def test_a_row_that_is_far_smaller_than_the_rest_keeps_its_shape():
    weights = torch.randn(16, 128)
    weights[3] /= 300
    codec = LinearCodec(16, 128, torch.float32, "int4")
    found = codec.decode(codec.encode(weights)[0], torch.float32)
    assert (found - weights)[3].square().sum() < 0.012 * weights[3].square().sum()
