"""The quantizer: exact where it can be, bounded everywhere, as good as was measured, one code for every precision.

G is the weights of a group. Errors are relative Frobenius errors, ||w - w_hat|| / ||w||.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynaexq.errors import QuantizationError
from dynaexq.quantization import scales
from dynaexq.quantization.quantize import LARGEST_WEIGHT, Code, check_representable, dequantize, quantize

G = 64
DEPTHS = (2, 4, 8)
FITS = [(bits, method) for bits in DEPTHS for method in ("rtn", "als")]

GROUPS = {
    "gaussian": lambda noise: noise,
    "small": lambda noise: 1e-4 * noise,
    "smaller than a float16 step": lambda noise: 1e-6 * noise,
    "heavy tails": lambda noise: noise**3,
    "far from zero": lambda noise: 10 + 0.01 * noise,
    "one-sided": lambda noise: noise.abs(),
    "mostly zero": lambda noise: noise * (noise > 1.5),
    "whole numbers": lambda noise: noise.round(),
    "two values": lambda noise: noise.sign(),
    "one giant": lambda noise: torch.where(torch.arange(G) == 3, LARGEST_WEIGHT, noise),
    "all giants": lambda noise: LARGEST_WEIGHT * noise.clamp(-1, 1),
}
each_depth = pytest.mark.parametrize("bits", DEPTHS)
each_fit = pytest.mark.parametrize(("bits", "method"), FITS)
every_kind = pytest.mark.parametrize("kind", GROUPS)


def groups(kind: str, rows: int = 128) -> Tensor:
    """`[rows, G]`: one group a row."""
    return GROUPS[kind](torch.randn(rows, G))


def dequantize_at(code: Code, bits: int) -> Tensor:
    return dequantize(code.values & -(1 << 8 - bits) % 256, code.scale, code.minimum, bits)


def squared_errors(weights: Tensor, bits: int, method: str, unshrink: bool = False) -> Tensor:
    code = quantize(weights, G, bits, method, unshrink)
    return (dequantize_at(code, bits).double() - weights).square().sum(-1)


def same(code: Code, other: Code) -> bool:
    return all(torch.equal(getattr(code, part), getattr(other, part)) for part in ("values", "scale", "minimum"))


@pytest.mark.parametrize("unshrink", [False, True], ids=["", "un-shrunk"])
@each_fit
def test_weights_on_a_grid_come_back_exactly(bits, method, unshrink):
    levels = torch.randint(0, 2**bits, (32, G), dtype=torch.uint8)
    levels[:, 0], levels[:, 1] = 0, 2**bits - 1
    scale = 2.0 ** torch.randint(-9, -2, (32, 1))
    weights = dequantize(levels << 8 - bits, scale, -7 * scale, bits)
    code = quantize(weights, G, bits, method, unshrink)
    assert torch.equal(dequantize_at(code, bits), weights)
    assert torch.equal(code.values >> 8 - bits, levels)


@pytest.mark.parametrize("unshrink", [False, True], ids=["", "un-shrunk"])
@each_fit
@pytest.mark.parametrize("value", [0.0, 1e-3, -0.37, 32768.0, -32768.0])
def test_a_constant_group_comes_back_as_float16_holds_it_at_every_depth(value, bits, method, unshrink):
    code = quantize(torch.full((3, 2 * G), value), G, bits, method, unshrink)
    for depth in DEPTHS:
        assert torch.equal(dequantize_at(code, depth), torch.full((3, 2 * G), value).half().float())


@each_depth
@every_kind
def test_rounding_errs_by_at_most_half_a_step(kind, bits):
    weights = groups(kind)
    low, high = weights.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    float16_rounding = 2.0**-11 * (weights.abs().amax(-1, keepdim=True) + 4 * 2**bits * step) + 2.0**-18
    errors = (dequantize_at(quantize(weights, G, bits, "rtn"), bits) - weights).abs()
    assert (errors <= step / 2 + float16_rounding).all()


@each_depth
@every_kind
def test_least_squares_is_never_worse_than_rounding_in_any_group(kind, bits):
    weights = groups(kind)
    rounded = squared_errors(weights, bits, "rtn")
    assert (squared_errors(weights, bits, "als") <= rounded * (1 + 1e-5)).all()


finite_weights = st.floats(-LARGEST_WEIGHT, LARGEST_WEIGHT, width=32)


@given(st.lists(finite_weights, min_size=1, max_size=6), st.randoms(use_true_random=False), st.sampled_from(FITS))
@settings(max_examples=150)
def test_finite_weights_never_become_infinite_or_nan(values, random, fit):
    weights = torch.tensor([[random.choice(values) for _ in range(G)]])
    for unshrink in (False, True):
        code = quantize(weights, G, *fit, unshrink=unshrink)
        assert all(dequantize_at(code, bits).isfinite().all() for bits in DEPTHS)


def test_stretching_a_group_with_a_giant_does_not_leave_float16():
    weights = torch.tensor([[-32768.0] + 9 * [-7250.0] + 54 * [15500.0]])
    code = quantize(weights, G, 2, unshrink=True)
    assert code.minimum.isfinite().all()
    assert squared_errors(weights, 2, "als", unshrink=True) < 0.05 * weights.square().sum()


@each_fit
@every_kind
def test_the_top_bits_of_the_code_are_the_rounding_at_every_depth(kind, bits, method):
    weights = groups(kind)
    code = quantize(weights, G, bits, method)
    scale, minimum = code.scale.double(), code.minimum.double()
    for depth in DEPTHS:
        lowest = minimum + scale / 16 * (2 ** (8 - depth) - 1) / 2
        position = (weights - lowest) / (scale * 2.0 ** (4 - depth)).clamp_min(1e-30)
        distance = (code.values >> 8 - depth) - position.clamp(0, 2**depth - 1)
        assert distance.abs().max() < 0.5 + 1e-3  # a tie may fall to either side


@each_fit
def test_a_batch_of_experts_equals_one_by_one_bit_for_bit(bits, method):
    experts = torch.randn(3, 5, 7, 4 * G)
    for unshrink in (False, True):
        together = quantize(experts, G, bits, method, unshrink)
        for i, expert in enumerate(experts):
            alone = quantize(expert, G, bits, method, unshrink)
            assert same(Code(together.values[i], together.scale[i], together.minimum[i]), alone)


@each_fit
def test_the_same_weights_give_the_same_code_whatever_their_strides(bits, method):
    weights = torch.randn(2 * G, 24).T
    before = weights.clone()
    code = quantize(weights, G, bits, method)
    assert torch.equal(weights, before)
    assert same(code, quantize(weights, G, bits, method))
    assert same(code, quantize(weights.contiguous(), G, bits, method))


# What was measured for Gaussian weights when the design was made; a change of one hundredth is a change of method.
MEASURED = {
    (2, 32, "rtn"): 0.393,
    (2, 32, "als"): 0.2995,
    (2, 64, "rtn"): 0.451,
    (2, 64, "als"): 0.3215,
    (2, 128, "rtn"): 0.502,
    (2, 128, "als"): 0.334,
    (4, 64, "rtn"): 0.0897,
    (4, 64, "als"): 0.0839,
    (4, 128, "rtn"): 0.0999,
    (4, 128, "als"): 0.0937,
}


@pytest.mark.parametrize(("bits", "group_size", "method"), MEASURED, ids=str)
def test_the_error_on_gaussian_weights_is_the_one_measured(bits, group_size, method):
    weights = torch.randn(128, 1024)
    code = quantize(weights, group_size, bits, method)
    error = (dequantize_at(code, bits) - weights).norm() / weights.norm()
    assert error == pytest.approx(MEASURED[bits, group_size, method], rel=0.01)


def test_a_code_fitted_at_four_bits_reads_well_at_every_depth():
    weights = torch.randn(128, 1024)
    code = quantize(weights, G)
    errors = [float((dequantize_at(code, bits) - weights).norm() / weights.norm()) for bits in DEPTHS]
    assert errors == pytest.approx([0.360, 0.0839, 0.0059], rel=0.01)


@pytest.mark.parametrize(("coarse", "fine", "gain"), [(2, 3, 0.995), (2, 4, 0.99), (3, 4, 0.995)])
def test_a_fit_that_looks_after_a_coarse_reading_too_improves_it_at_little_cost_to_the_fine_one(coarse, fine, gain):
    weights = torch.randn(128, 1024)
    errors = {}
    for bits in (None, coarse):
        code = quantize(weights, G, fine, coarse_bits=bits)
        errors[bits] = [float((dequantize_at(code, b) - weights).norm() / weights.norm()) for b in (coarse, fine)]
    assert errors[coarse][0] < gain * errors[None][0]
    assert errors[coarse][1] < 1.05 * errors[None][1]


def test_several_starts_at_two_bits_are_better_than_one_in_the_mean(monkeypatch):
    weights = groups("gaussian", 2048)
    several = squared_errors(weights, 2, "als")
    monkeypatch.setattr(scales, "STARTS", (1.0,))
    one = squared_errors(weights, 2, "als")
    assert several.mean() < 0.99 * one.mean()  # not in every group: the best after two rounds need not end as the best


@pytest.mark.parametrize("bits", [2, 4])
def test_an_unshrunk_reading_is_as_long_as_the_weights_and_little_worse(bits):
    weights = torch.randn(128, 1024)
    lengths, errors = [], []
    for unshrink in (False, True):
        read_back = dequantize_at(quantize(weights, G, bits, unshrink=unshrink), bits)
        lengths.append(float((read_back * weights).sum() / weights.square().sum()))
        errors.append(float((read_back - weights).norm() / weights.norm()))
    assert lengths[0] == pytest.approx(1 - errors[0] ** 2, abs=1e-3)  # least squares returns a projection
    assert abs(1 - lengths[1]) < 0.4 * abs(1 - lengths[0])
    assert errors[0] < errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 40000.0, -40000.0])
def test_what_no_code_can_represent_is_named_by_tensor_expert_and_value(value, dtype):
    weights = torch.zeros(4, 2, G, dtype=dtype)
    weights[2, 1, 5] = weights[3, 0, 0] = value
    found = f"{abs(float(weights[2, 1, 5])):g}"
    with pytest.raises(
        QuantizationError, match=rf"layers\.7\.down_proj, expert 2: .*found {found};.*tiers=\('fp16',\)"
    ):
        check_representable(weights, "layers.7.down_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_weight_is_representable(dtype):
    check_representable(torch.tensor([[0.0, LARGEST_WEIGHT], [-LARGEST_WEIGHT, 1.0]], dtype=dtype), "up")
