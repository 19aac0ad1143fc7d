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
from dynaexq.kernels import cpu
from dynaexq.kernels.cpu.build import load
from dynaexq.runtime import few_rows
from dynaexq.runtime.few_rows import FewRowsLinear

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
    monkeypatch.setattr("dynaexq.hf.model_patch.SMALLEST", 2**10)
    model = tiny_model("qwen3_moe").bfloat16()
    patching.patch(model, "1GiB", tiers=("int8",), dense="int8")
    with Seen() as seen:
        model(tiny.prompt())
    assert {"dynaexq.experts.default", "dynaexq.linear.default"} <= set(seen.names)


def adopted(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, FewRowsLinear)}


def test_a_patched_model_has_them_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.hf.model_patch.SMALLEST", 2**10)
    model = tiny_model("qwen3_moe").bfloat16()
    kinds = {path: type(module) for path, module in model.named_modules()}
    patching.patch(model, "1GiB", tiers=("int8", "fp16"))
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= adopted(model)
    assert not any(path.endswith("gate") for path in adopted(model)), "routers stay as they are"
    with torch.no_grad():
        before = tiny.logits(model)
        monkeypatch.setattr(FewRowsLinear, "_is_plain", lambda *_: False)
        assert_close("logits", tiny.logits(model), before, 0.05)
    dynaexq.unpatch(model)
    assert {path: type(module) for path, module in model.named_modules()} == kinds


def test_exact_and_float32_models_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.hf.model_patch.SMALLEST", 2**10)
    exact = tiny_model("qwen3_moe").bfloat16()
    patching.patch(exact, "1GiB", tiers=("fp16",))
    single = tiny_model("qwen3_moe")
    patching.patch(single, "1GiB", tiers=("int4",))
    assert not adopted(exact) | adopted(single)
    assert few_rows.SMALLEST == 2**16
