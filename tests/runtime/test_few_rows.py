"""16-bit dense layers on a CPU: few rows pass natively and differ by a rounding, everything else is PyTorch's."""

import copy
import io
import pickle
from typing import Any

import patching
import pytest
import tiny
import torch
from models import tiny_model
from numerics import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dynaexq
from dynaexq.hf.model_patch import restore_class, swap_class
from dynaexq.kernels import cpu, rms_norm
from dynaexq.kernels.cpu.build import load
from dynaexq.runtime.few_rows import MOST_NORMALIZED, FewRows, FewRowsLinear, FewRowsNorm, mixin_for, norm_kind

ROUNDING = 2**-8

pytestmark = pytest.mark.skipif(load(True) is None, reason="needs the native kernel")


def layer(bias: bool = True, columns: int = 128) -> nn.Linear:
    linear = nn.Linear(columns, 96, bias=bias, dtype=torch.bfloat16)
    swap_class(linear, FewRowsLinear)
    return linear


def rows(count: int, columns: int = 128) -> Tensor:
    return torch.randn(count, columns, dtype=torch.bfloat16)


def refuse(*_: object) -> Tensor:
    raise AssertionError("left to PyTorch")


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_few_rows_differ_by_a_rounding(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer(bias)
    inputs = [rows(1), rows(3)[:, None], rows(cpu.FEWER_ROWS).view(2, -1, 128), rows(2).T.contiguous().T]
    expected = [F.linear(row, linear.weight, linear.bias) for row in inputs]
    monkeypatch.setattr(nn.Linear, "forward", refuse)
    for one, other in zip(expected, map(linear, inputs), strict=True):
        assert_close("few rows", one, other, ROUNDING)


@torch.no_grad()
def test_many_rows_other_dtypes_and_widths_are_left_to_pytorch() -> None:
    linear, many = layer(), rows(cpu.MOST_ROWS + 1)
    assert torch.equal(linear(many), F.linear(many, linear.weight, linear.bias))
    assert linear(torch.empty(0, 128, dtype=torch.bfloat16)).shape == (0, 96)
    odd, row = layer(columns=100), rows(1, 100)  # the kernel would have to copy the rows of the matrix
    assert torch.equal(odd(row), F.linear(row, odd.weight, odd.bias))
    with pytest.raises(RuntimeError):
        linear(rows(1, 64))
    with pytest.raises(RuntimeError):
        linear(rows(1).float())


def test_gradients_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, row = layer(), rows(1).requires_grad_()
    linear(row).sum().backward()
    assert_close("weight", row.detach().expand(96, -1), linear.weight.grad, 0)
    assert row.grad is not None
    assert torch.func.vmap(linear)(rows(3)).shape == (3, 96)


@torch.no_grad()
def test_a_weight_that_others_change_cast_or_replace_is_followed() -> None:
    linear, row = layer(), rows(1)
    linear(row)
    linear.weight.mul_(2)
    assert_close("changed", F.linear(row, linear.weight, linear.bias), linear(row), ROUNDING)
    linear.weight.data = torch.randn(96, 128, dtype=torch.bfloat16)
    assert_close("replaced", F.linear(row, linear.weight, linear.bias), linear(row), ROUNDING)
    linear.float()
    assert torch.equal(linear(row.float()), F.linear(row.float(), linear.weight, linear.bias))
    linear.bfloat16()
    assert_close("cast", F.linear(row, linear.weight, linear.bias), linear(row), ROUNDING)


@torch.no_grad()
def test_copies_and_pickles_are_plain_layers() -> None:
    linear, row = layer(), rows(1)
    linear(row)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(twin) is nn.Linear
        assert torch.equal(twin.weight, linear.weight)
    file = io.BytesIO()
    torch.save(linear, file)
    restore_class(linear)
    assert type(linear) is nn.Linear


class Seen(TorchDispatchMode):
    """The operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_looks_at_operators_sees_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, row = layer(), rows(1)
    expected = F.linear(row, linear.weight, linear.bias)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(row), expected)
    with Seen() as seen:
        assert torch.equal(linear(row), expected)
    assert any("addmm" in name or "linear" in name for name in seen.names)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert linear(torch.empty(1, 128, dtype=torch.bfloat16)).shape == (1, 96)
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 2**10)
    model = tiny_model("qwen3_moe").bfloat16()
    patching.patch(model, "1GiB", tiers=("int8",), dense="int8")
    with Seen() as seen:
        model(tiny.prompt())
    assert {"dynaexq.experts.default", "dynaexq.linear.default"} <= set(seen.names)


NORMS = {"qwen3_moe": (0, True), "mixtral": (0, True), "qwen3_next": (1, False), "gpt_oss": (0, False)}
"""Families, what is added to the weights of their norms, and whether the quotient is rounded."""


def norm_of(family: str) -> nn.Module:
    model = tiny_model(family).bfloat16()
    norm = model.model.norm
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight) * 0.2)
    return norm


@pytest.mark.parametrize("family", NORMS)
@torch.no_grad()
def test_norms_are_recognized_by_what_they_do(family: str) -> None:
    norm = norm_of(family)
    assert norm_kind(norm)[1:] == NORMS[family]
    norm.forward = lambda rows: 2 * type(norm).forward(norm, rows)
    assert norm_kind(norm) is None


@pytest.mark.parametrize("family", NORMS)
@torch.no_grad()
def test_few_rows_are_normalized_to_the_bits_of_the_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norm_of(family)
    columns = len(norm.weight)
    inputs = [
        10**exponent * torch.randn(shape).bfloat16()
        for exponent in (-3, 0, 3)
        for shape in ((columns,), (2, 3, columns))
    ]
    inputs.append(torch.zeros(1, columns).bfloat16())
    inputs.append(torch.full((1, columns), torch.nan).bfloat16())
    expected = [norm(rows) for rows in inputs]
    assert mixin_for(norm) is FewRowsNorm
    swap_class(norm, FewRowsNorm)
    for rows, one in zip(inputs, expected, strict=True):
        monkeypatch.setattr(type(norm).__bases__[1], "forward", refuse)
        other = norm(rows)
        # The squares are added up in another order, which is seldom seen in 8 bits.
        assert one.shape == other.shape
        assert ((one - other).abs() <= ROUNDING * one.abs()).logical_or(one.isnan() & other.isnan()).all()
        assert (one != other).float().mean() < 0.05 or one.isnan().all()


def test_many_rows_gradients_and_other_arguments_are_the_familys_own() -> None:
    norm = norm_of("qwen3_moe")
    columns = len(norm.weight)
    many = torch.randn(MOST_NORMALIZED // columns + 1, columns).bfloat16()
    expected = norm(many)
    assert mixin_for(norm) is FewRowsNorm
    swap_class(norm, FewRowsNorm)
    assert torch.equal(norm(many), expected)
    row = torch.randn(1, columns, dtype=torch.bfloat16, requires_grad=True)
    norm(row).sum().backward()
    assert row.grad is not None
    assert norm.weight.grad is not None
    with pytest.raises(TypeError):
        norm(row, gate=row)
    with torch.no_grad():
        norm.float()
        assert torch.equal(norm(row.float()), rms_norm(row.float(), norm.weight, norm._kind))
    assert type(pickle.loads(pickle.dumps(norm))) is type(norm).__bases__[1]


def adopted(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, FewRows)}


def test_a_patched_model_has_them_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 2**10)
    model = tiny_model("qwen3_moe").bfloat16()
    kinds = {path: type(module) for path, module in model.named_modules()}
    patching.patch(model, "1GiB", tiers=("int8", "fp16"))
    assert {"lm_head", "model.norm", "model.layers.0.self_attn.q_proj"} <= adopted(model)
    assert not any(path.endswith("gate") for path in adopted(model)), "routers stay as they are"
    with torch.no_grad():
        before = tiny.logits(model)
        monkeypatch.setattr(FewRows, "takes_native_way", lambda *_: False)
        assert_close("logits", tiny.logits(model), before, 0.05)
    dynaexq.unpatch(model)
    assert {path: type(module) for path, module in model.named_modules()} == kinds


def test_exact_and_float32_models_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 2**10)
    exact = tiny_model("qwen3_moe").bfloat16()
    patching.patch(exact, "1GiB", tiers=("fp16",))
    single = tiny_model("qwen3_moe")
    patching.patch(single, "1GiB", tiers=("int4",))
    assert not adopted(exact) | adopted(single)
