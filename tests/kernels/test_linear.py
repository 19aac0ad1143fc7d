"""Packed dense layers: every kernel follows the decoded matrix, forward and backward, and takes no wrong rows."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from dynaexq.errors import InputError
from dynaexq.kernels import LinearLayer, cpu, linear, linear_gradient, linear_layer
from dynaexq.kernels.cpu import build, native
from dynaexq.quantization import IN_STRIPS, ROW_BY_ROW, Arrangement, LinearCodec
from dynaexq.runtime.linear import PackedLinear
from dynaexq.types import BITS

SHAPES = [(96, 256), (72, 200), (300, 64), (64, 704)]  # no tile divides the rows, no block the columns
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

each_format = pytest.mark.parametrize("tier", ["int4", "int6", "int8"])
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def packed(
    rows: int,
    columns: int,
    tier: str,
    dtype: torch.dtype = torch.float32,
    arrangement: Arrangement = IN_STRIPS,
    activations: str = "int16",
) -> tuple[LinearLayer, Tensor]:
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns) / columns**0.5
    codec = LinearCodec(rows, columns, dtype, tier, arrangement=arrangement)
    return LinearLayer(codec, codec.encode(weight)[0], activations), weight


@each_format
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_comes_back_to_within_its_steps(shape: tuple[int, int], tier: str) -> None:
    layer, weight = packed(*shape, tier)
    found = layer.codec.decode(layer.block, torch.float32)
    error = float((found - weight).square().sum() / weight.square().sum())
    assert error < {"int4": 1e-2, "int6": 7e-4, "int8": 5e-5}[tier]
    assert layer.codec.encode(weight)[1] == pytest.approx(error, rel=1e-3)
    padded, bits = -(-shape[1] // 64) * 64, BITS[tier] + 0.25
    assert 0 <= layer.codec.nbytes - shape[0] * padded * bits / 8 < 256 + 2 * 64


@each_format
@each_dtype
@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 9, 70])
def test_the_product_follows_the_decoded_matrix(num_rows: int, dtype: torch.dtype, tier: str) -> None:
    for shape in SHAPES:
        layer, _ = packed(*shape, tier, dtype)
        by_rows, _ = packed(*shape, tier, dtype, ROW_BY_ROW)
        rows = torch.randn(num_rows, shape[1]).to(dtype)
        weight = layer.codec.decode(layer.block, torch.float32)
        assert torch.equal(weight, by_rows.codec.decode(by_rows.block, torch.float32))
        expected = F.linear(rows.float(), weight).to(dtype)
        for output in (linear(rows, layer), linear(rows, by_rows), linear_layer.linear(rows, layer)):
            assert (output.dtype, output.shape) == (dtype, (num_rows, shape[0]))
            assert_close(f"{shape} {num_rows}", expected, output, TOLERANCE[dtype])


def rounded(rows: Tensor, group: int, largest: int) -> Tensor:
    """Rows as the kernel rounds them, group by group."""
    groups = F.pad(rows.float(), (0, -rows.shape[1] % 64)).unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / largest
    return ((groups / scale).round() * scale).flatten(1)[:, : rows.shape[1]]


@each_format
@pytest.mark.parametrize(("activations", "of"), [("int8", 127), ("int16", 32767), ("auto", None)])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 17, 40])
def test_rows_are_rounded_as_was_asked(num_rows: int, activations: str, of: int | None, tier: str) -> None:
    for shape in SHAPES:
        layer, _ = packed(*shape, tier, torch.float16, activations=activations)
        rows = torch.randn(num_rows, shape[1]).half() * 10 ** torch.randn(1, shape[1]).half()
        largest = of or {"int4": 127, "int6": 32767, "int8": 32767}[tier]
        weight = layer.codec.decode(layer.block, torch.float32)
        expected = F.linear(rounded(rows, layer.codec.matrix.group_size, largest), weight)
        assert_close(f"{shape} {num_rows}", expected, linear(rows, layer).float(), 1e-3)


def test_rows_that_are_not_finite_do_not_come_out_finite() -> None:
    for activations in ("int8", "int16"):
        layer, _ = packed(96, 256, "int4", torch.float16, activations=activations)
        for value in (float("nan"), float("inf")):
            rows = torch.ones(3, 256).half()
            rows[1, 200] = value
            output = linear(rows, layer)
            assert not output[1].isfinite().any()
            assert output[[0, 2]].isfinite().all()


def test_a_row_has_the_same_product_whatever_stands_beside_it() -> None:
    layer, _ = packed(96, 256, "int4", torch.bfloat16, activations="int8")
    rows = torch.randn(40, 256).bfloat16()
    together = linear(rows, layer)
    for some in (slice(3, 4), slice(5, 7), slice(0, 21)):
        assert torch.equal(linear(rows[some], layer), together[some])


@each_format
@each_dtype
def test_the_gradient_follows_the_decoded_matrix(dtype: torch.dtype, tier: str) -> None:
    for shape in SHAPES:
        layer, _ = packed(*shape, tier, dtype)
        grad = torch.randn(5, shape[0]).to(dtype)
        expected = (grad.float() @ layer.codec.decode(layer.block, torch.float32)).to(dtype)
        for pull_back in (linear_gradient, linear_layer.linear_gradient):
            assert_close(f"{shape}", expected, pull_back(grad, layer), TOLERANCE[dtype])


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@each_dtype
def test_a_matrix_in_16_bit_is_multiplied_where_it_lies(num_rows: int, dtype: torch.dtype) -> None:
    library = build.load(all_bfloat16=dtype == torch.bfloat16)
    if library is None:
        pytest.skip("no native kernel here")
    for shape in SHAPES:
        weight, rows = torch.randn(shape).to(dtype), torch.randn(num_rows, shape[1]).to(dtype)
        found = native.NativeLinear(None, weight, dtype, library.forward)(rows)
        assert_close(f"{shape}", F.linear(rows.float(), weight.float()).to(dtype), found, TOLERANCE[dtype])


def test_the_native_kernel_is_what_runs_here() -> None:
    layer, _ = packed(96, 256, "int4")
    linear(torch.randn(2, 256), layer)
    if build.load(False) is not None:
        assert isinstance(layer.prepared[torch.float32], native.NativeLinear)


def test_without_a_kernel_the_matrix_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda all_bfloat16: None)
    layer, _ = packed(96, 256, "int8")
    rows = torch.randn(3, 256)
    assert torch.equal(linear(rows, layer), linear_layer.linear(rows, layer))


def module(tier: str = "int8", bias: bool = True) -> PackedLinear:
    layer, _ = packed(96, 256, tier)
    return PackedLinear(layer.codec, layer.block, torch.randn(96) if bias else None)


@pytest.mark.parametrize("bias", [False, True])
def test_a_module_is_a_linear_layer_whose_weight_is_constant(bias: bool) -> None:
    packed_linear = module(bias=bias)
    plain = torch.nn.Linear(256, 96, bias=bias).requires_grad_(False)
    plain.weight.data = packed_linear.codec.decode(packed_linear.packed, torch.float32)
    if bias:
        plain.bias.data = packed_linear.bias.detach().clone()
    rows = torch.randn(2, 3, 256, requires_grad=True)
    output, expected = packed_linear(rows), plain(rows)
    (grad,), (expected_grad,) = (torch.autograd.grad(o.square().sum(), rows) for o in (output, expected))
    rows, output, expected = rows.detach(), output.detach(), expected.detach()
    assert_close("output", expected, output, 2e-5)
    assert_close("gradient", expected_grad, grad, 2e-5)
    with torch.no_grad():
        assert torch.equal(packed_linear(rows), output)
    _, found = torch.func.vjp(packed_linear, rows)
    assert_close("vjp", torch.func.vjp(plain, rows)[1](expected)[0], found(expected)[0], 2e-5)
    assert not any(parameter.requires_grad for parameter in packed_linear.parameters())


def test_a_module_is_compiled_without_a_break() -> None:
    packed_linear = module()
    rows = torch.randn(4, 256)
    compiled = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), packed_linear(rows))


def test_a_copied_module_has_a_weight_of_its_own() -> None:
    packed_linear = module()
    twin = copy.deepcopy(packed_linear)
    rows = torch.randn(4, 256)
    before = packed_linear(rows)
    twin.packed.data.zero_()
    assert torch.equal(packed_linear(rows), before)
    assert not torch.equal(twin(rows), before)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (torch.ones(2, 255), r"expected floating rows \[N, 256\], got torch.float32 \[2, 255\]"),
        (torch.ones(2, 256, dtype=torch.int64), r"expected floating rows \[N, 256\], got torch.int64"),
        (torch.ones(2, 256, device="meta"), "expected rows on cpu, where the dense layer is, got meta; move"),
    ],
)
def test_rows_that_do_not_belong_to_the_matrix_are_refused(rows: Tensor, match: str) -> None:
    with pytest.raises(InputError, match=match):
        module()(rows)


def test_threads_that_meet_a_layer_at_once_find_it_arranged_once() -> None:
    for seed in range(5):
        layer, _ = packed(96, 256, "int4", arrangement=ROW_BY_ROW)
        module, rows = PackedLinear(layer.codec, layer.block, activations="int16"), torch.randn(3, 256)
        expected = linear(rows, packed(96, 256, "int4")[0])
        with ThreadPoolExecutor(8) as threads:
            outputs = list(threads.map(module, [rows] * 32))
        for output in outputs:
            assert_close(f"seed {seed}", expected, output, TOLERANCE[torch.float32])


def test_a_copy_a_pickle_and_a_state_dict_of_an_arranged_layer_mean_the_same() -> None:
    layer, _ = packed(72, 200, "int4", arrangement=ROW_BY_ROW)
    module, rows = PackedLinear(layer.codec, layer.block, activations="int16"), torch.randn(3, 200)
    expected = module(rows)
    assert torch.equal(module.state_dict()["packed"], layer.block), "as files have it"
    fresh = PackedLinear(layer.codec, torch.zeros_like(layer.block), activations="int16")
    fresh(rows)
    fresh.load_state_dict(module.state_dict())
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu"), module.float()):
        assert torch.equal(other(rows), expected)
