"""The codec: every pair, at the documented size, reads back at the error it reports, on ugly shapes too.

n is a number of experts, H the hidden size, I the intermediate size, K the columns of a matrix.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.quantization.grid_format import ByteGrids
from dynaexq.quantization.layout import MatrixLayout
from dynaexq.quantization.plane_codec import REFINE_PLANES
from dynaexq.quantization.quantize import dequantize, quantize
from dynaexq.types import ALL_TIERS, BITS, ExpertShape

SHAPES = {
    "H=256 I=64": ExpertShape(256, 64, 128, has_bias=False, transposed=False),
    "H=1408 I=48 transposed": ExpertShape(1408, 48, 96, has_bias=False, transposed=True),
    "H=2880 I=16 transposed with biases": ExpertShape(2880, 16, 32, has_bias=True, transposed=True),
    "H=96 I=96 without a gate": ExpertShape(96, 96, 96, has_bias=False, transposed=False),
    "H=48 I=16 with biases, without a gate": ExpertShape(48, 16, 16, has_bias=True, transposed=False),
}
SMALL = ExpertShape(96, 48, 96, has_bias=True, transposed=True)
LARGEST_ERROR = {"int2": 0.37, "int3": 0.18, "int4": 0.088, "int6": 0.023, "int8": 0.007, "fp16": 0.0}

each_pair = pytest.mark.parametrize("tiers", ALL_TIERS, ids="+".join)
each_code = pytest.mark.parametrize("tiers", [tiers for tiers in ALL_TIERS if "fp16" not in tiers], ids="+".join)
each_format = pytest.mark.parametrize("scale_bits", [8, 16])
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def random_weights(shape: ExpertShape, n: int = 2, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """As a model stores them: turned round where the shape says so."""
    up = torch.randn(n, shape.up_rows, shape.hidden_size, dtype=dtype)
    down = torch.randn(n, shape.hidden_size, shape.intermediate_size, dtype=dtype)
    biases = [torch.randn(n, rows, dtype=dtype) if shape.has_bias else None for rows in (shape.up_rows, down.shape[1])]
    return ExpertWeights(*(turned(matrix, shape).contiguous() for matrix in (up, down)), *biases)


def turned(matrix: Tensor, shape: ExpertShape) -> Tensor:
    return matrix.transpose(1, 2) if shape.transposed else matrix


def some(weights: ExpertWeights, experts: slice) -> ExpertWeights:
    return ExpertWeights(*(None if part is None else part[experts] for part in vars(weights).values()))


def same(weights: ExpertWeights, other: ExpertWeights) -> bool:
    pairs = zip(vars(weights).values(), vars(other).values(), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def readings(codec: ExpertCodec, weights: ExpertWeights) -> list[ExpertWeights]:
    """The weights at each tier of the pair."""
    encoded = codec.encode(weights)
    upgrades = [None, encoded.upgrade][: len(codec.tiers)]
    return [codec.decode(encoded.base, upgrade, codec.dtype) for upgrade in upgrades]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@each_format
@each_pair
def test_blocks_and_slots_have_the_documented_bits_a_weight(tiers, scale_bits, group_size):
    shape = ExpertShape(hidden_size=256, intermediate_size=512, up_rows=1024, has_bias=False, transposed=False)
    codec = ExpertCodec(shape, torch.bfloat16, tiers, group_size, scale_bits=scale_bits)
    found = [tier.nbytes * 8 / shape.num_weights for tier in (codec.base, codec.upgrade) if tier]
    bits = [BITS[tier] + 2 * scale_bits / group_size if tier != "fp16" else 16 for tier in tiers]
    if tiers in REFINE_PLANES:  # what the base holds already is not stored twice
        bits[1] -= bits[0]
    units = 256 * 8 / shape.num_weights if scale_bits == 8 and tiers[0] != "fp16" else 0  # a block's least growth
    assert found == [bits[0] + units, *bits[1:]]


def test_sixteen_bit_blocks_of_a_float32_model_are_counted_at_32():
    codec = ExpertCodec(SHAPES["H=256 I=64"], torch.float32, ("fp16",))
    assert codec.base.nbytes == 4 * codec.shape.num_weights


@each_pair
@each_shape
def test_every_part_is_aligned_and_none_overlap(shape, tiers):
    codec = ExpertCodec(shape, torch.bfloat16, tiers)
    for layout in (codec.base_layout, codec.upgrade_layout):
        ends = [0] + [part.offset + part.nbytes for part in layout.parts]
        offsets = [part.offset for part in layout.parts] + [layout.nbytes]
        assert all(end <= offset for end, offset in zip(ends, offsets, strict=True))
        assert all(offset % 64 == 0 for offset in offsets)  # a cache line
        assert layout.nbytes % 256 == 0  # a table entry counts addresses in units of 256 bytes


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"),
    [
        (2048, 64, (2048, 256, 64)),
        (768, 128, (768, 256, 128)),
        (1408, 128, (1408, 128, 128)),
        (2880, 128, (2880, 64, 64)),
        (96, 128, (128, 128, 128)),
        (48, 128, (64, 64, 64)),
        (16, 32, (64, 64, 32)),
    ],
)
def test_columns_are_cut_into_the_largest_blocks_and_groups_that_fit(columns, group_size, expected):
    layout = MatrixLayout.of(10, columns, group_size)
    assert (layout.padded, layout.block, layout.group_size) == expected


@each_pair
@each_shape
def test_each_tier_reads_back_at_the_error_that_was_reported(shape, tiers):
    weights = random_weights(shape)
    codec = ExpertCodec(shape, torch.float32, tiers)
    reported = codec.encode(weights).errors
    assert reported.shape == (2, len(tiers))
    for tier, reading, errors in zip(tiers, readings(codec, weights), reported.T, strict=True):
        measured = np.zeros(2)
        for name in ("up", "down"):
            matrix, read = turned(getattr(weights, name), shape), getattr(reading, name)
            assert read.shape == matrix.shape
            measured += ((read - matrix).norm(dim=(1, 2)) / matrix.norm(dim=(1, 2))).square().numpy()
        np.testing.assert_allclose(measured, errors, rtol=1e-4)
        assert (errors <= 2 * LARGEST_ERROR[tier] ** 2).all()
        for name in ("up_bias", "down_bias"):
            assert getattr(reading, name) is None or torch.equal(getattr(reading, name), getattr(weights, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tiers", [tiers for tiers in ALL_TIERS if tiers[-1] == "fp16"], ids="+".join)
def test_sixteen_bit_weights_are_views_of_the_bytes_equal_to_the_source_bit_for_bit(tiers, dtype):
    weights = random_weights(SMALL, dtype=dtype)
    weights.up[0, 0, 0] = -0.0
    weights.down[0, 0, 0] = torch.finfo(dtype).smallest_normal / 2
    codec = ExpertCodec(SMALL, dtype, tiers)
    encoded = codec.encode(weights)
    reading = codec.decode(encoded.base, encoded.upgrade, torch.float32)
    block = encoded.base if tiers == ("fp16",) else encoded.upgrade
    for name, source in vars(weights).items():
        read = getattr(reading, name)
        assert read.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        stored = turned(read, SMALL) if source.ndim == 3 else read
        assert torch.equal(stored.view(torch.uint8), source.view(torch.uint8))


def test_sixteen_bit_blocks_keep_what_no_code_could():
    weights = random_weights(SMALL, dtype=torch.bfloat16)
    weights.up[1, 2, 3] = torch.nan
    weights.down[1, 2, 3] = torch.inf
    (reading,) = readings(ExpertCodec(SMALL, torch.bfloat16, ("fp16",)), weights)
    assert turned(reading.up, SMALL)[1, 2, 3].isnan()
    assert turned(reading.down, SMALL)[1, 2, 3] == torch.inf


@each_shape
def test_a_code_reads_the_same_from_whichever_base_it_was_refined(shape):
    weights = random_weights(shape)
    at = {
        (tiers, tier): reading
        for tiers in REFINE_PLANES
        for tier, reading in zip(tiers, readings(ExpertCodec(shape, torch.float32, tiers), weights), strict=True)
    }
    assert same(at[("int2", "int8"), "int8"], at[("int4", "int8"), "int8"])
    # int2 + int4 is another code: its fit looks after both readings


@each_pair
def test_a_batch_of_experts_equals_one_by_one_bit_for_bit(tiers):
    weights = random_weights(SMALL, n=3)
    codec = ExpertCodec(SMALL, torch.bfloat16, tiers)
    together = codec.encode(weights)
    for i in range(3):
        alone = codec.encode(some(weights, slice(i, i + 1)))
        assert torch.equal(alone.base[0], together.base[i])
        assert (alone.errors[0] == together.errors[i]).all()
        if together.upgrade is not None:
            assert torch.equal(alone.upgrade[0], together.upgrade[i])


@each_code
def test_a_transposed_source_is_coded_to_the_same_bytes(tiers):
    upright = replace(SMALL, transposed=False)
    weights = random_weights(SMALL)
    turned_round = replace(weights, up=turned(weights.up, SMALL), down=turned(weights.down, SMALL))
    encoded = ExpertCodec(SMALL, torch.float32, tiers).encode(weights)
    expected = ExpertCodec(upright, torch.float32, tiers).encode(turned_round)
    assert torch.equal(encoded.base, expected.base)
    assert len(tiers) == 1 or torch.equal(encoded.upgrade, expected.upgrade)


def naive_weight(
    parts: dict[str, Tensor], name: str, planes, layout: MatrixLayout, bits: int, n: int, k: int
) -> float:
    """One weight from the words and metadata of its expert, as `bitplanes`, `quantize` and `grid_format` say."""
    code = 0
    for plane in planes:
        width = layout.block * plane.bits // 32
        position, h = divmod(k % layout.block, 2 * width)
        word = int(parts[f"{name}.{plane.name}"][n, k // layout.block * width + h // 2])
        code |= (word >> h % 2 * 16 + position * plane.bits & 2**plane.bits - 1) << plane.shift
    meta = parts[f"{name}.meta"]  # [blocks, N, groups of a block, 2]
    block, group = divmod(k // layout.group_size, meta.shape[2])
    scale, other = meta[block, n, group].tolist()
    center = code + (2 ** (8 - bits) - 1) / 2
    if f"{name}.unit" not in parts:
        return other + scale / 16 * center
    exponent, mantissa = divmod(scale, 32)
    scale = (1 + mantissa / 32) * 2.0 ** (exponent - 15) if exponent else mantissa / 32 * 2.0**-14
    return float(parts[f"{name}.unit"]) * scale / 16 * (center - other)


@each_code
@each_format
@pytest.mark.parametrize("shape", [SMALL, SHAPES["H=256 I=64"]], ids=["padded", "whole blocks"])
def test_the_bytes_of_a_code_mean_what_is_documented(shape, tiers, scale_bits):
    codec = ExpertCodec(shape, torch.float32, tiers, scale_bits=scale_bits)
    encoded = codec.encode(random_weights(shape, n=1))
    parts = codec.base_layout.view(encoded.base)
    if encoded.upgrade is not None:
        parts |= codec.upgrade_layout.view(encoded.upgrade)
    parts = {name: part[0] for name, part in parts.items()}
    planes, bits = codec.planes + codec.refine_planes, BITS[tiers[-1]]
    reading = codec.decode(encoded.base, encoded.upgrade, torch.float32)
    for name, layout in codec.matrices.items():
        matrix = getattr(reading, name)[0]
        for n, k in np.ndindex(5, layout.columns):
            expected = naive_weight(parts, name, planes, layout, bits, n, k)
            assert float(matrix[n, k]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("tiers", [tiers for tiers in ALL_TIERS if tiers[0] != "fp16"], ids="+".join)
def test_a_base_is_fitted_for_its_own_depth_and_unshrunk_unless_it_will_be_refined(tiers):
    weights, bits = random_weights(SHAPES["H=256 I=64"]), BITS[tiers[0]]
    refined = tiers in REFINE_PLANES
    finest = min(4, BITS[tiers[-1]])
    coarse_bits = bits if refined and finest == BITS[tiers[-1]] else None
    form, fit_bits = ByteGrids.of_weights(weights.up), finest if refined else bits
    code = quantize(weights.up, 64, fit_bits, unshrink=not refined, coarse_bits=coarse_bits, form=form)
    expected = dequantize(code.values & -(1 << 8 - bits) % 256, code.scale, code.minimum, bits)
    assert torch.equal(readings(ExpertCodec(SHAPES["H=256 I=64"], torch.float32, tiers), weights)[0].up, expected)


def test_the_quantizer_that_was_asked_for_is_used():
    weights = random_weights(SMALL)
    rounded, fitted = (
        ExpertCodec(SMALL, torch.float32, ("int2",), 64, m).encode(weights).errors for m in ("rtn", "als")
    )
    assert (fitted < 0.7 * rounded).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_code_is_read_in_the_dtype_that_was_asked_for(dtype):
    codec = ExpertCodec(SMALL, torch.bfloat16, ("int4",))
    base = codec.encode(random_weights(SMALL)).base
    reading, exact = codec.decode(base, None, dtype), codec.decode(base, None, torch.float32)
    assert torch.equal(reading.up, exact.up.to(dtype))
    assert torch.equal(reading.down, exact.down.to(dtype))
