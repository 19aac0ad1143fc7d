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
from dynaexq.kernels import RoutingKind, cpu, rms_norm, top_k_routing
from dynaexq.kernels.cpu.build import load
from dynaexq.runtime.few_rows import (
    MOST_NORMALIZED,
    FewRows,
    FewRowsLinear,
    FewRowsNorm,
    FewRowsRouter,
    mixin_for,
    norm_kind,
    routing_kind,
)

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


ROUTERS = {
    "qwen3_moe": (False, True),
    "qwen3_next": (True, True),
    "mixtral": (True, False),
    "deepseek_v3": None,  # chooses by sigmoids, a bias and groups
    "ernie4_5_moe": None,  # a bias that is zero only at first
    "gpt_oss": None,
    "granitemoe": None,
}
"""Families, whether the weights of their routers are divided by their sum, and whether they are rounded."""


def router_of(family: str) -> nn.Module:
    model = tiny_model(family).bfloat16()
    parts = (module for module in model.modules() if "Router" in type(module).__name__)
    return next(parts, None) or next(m for m in model.modules() if "Gat" in type(m).__name__)


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_are_recognized_by_what_they_do(family: str) -> None:
    router = router_of(family)
    assert routing_kind(router) == ROUTERS[family]
    assert type(router) is type(router_of(family)), "trying has left it as it was"


@pytest.mark.parametrize("family", [family for family, kind in ROUTERS.items() if kind])
@torch.no_grad()
def test_few_rows_are_routed_as_the_family_routes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 0)
    router = router_of(family)
    columns = router.weight.shape[1]
    inputs = [torch.randn(*shape, columns).bfloat16() for shape in ((1,), (2, 2), (0,))]
    many = torch.randn(cpu.MOST_ROWS + 1, columns).bfloat16()
    expected, of_many = [router(given) for given in inputs], router(many)
    assert mixin_for(router) is FewRowsRouter
    swap_class(router, FewRowsRouter)
    assert all(map(torch.equal, router(many), of_many))
    monkeypatch.setattr(type(router).__bases__[1], "forward", refuse)
    for given, (logits, weights, ids) in zip(inputs, expected, strict=True):
        found = router(given)
        assert_close("logits", logits, found[0], 2 * ROUNDING)
        assert found[1].dtype == weights.dtype
        assert (found[2] == ids).float().mean() > 0.7 or not ids.numel()  # equal logits have no order
        assert torch.equal(found[1], top_k_routing(found[0], router.top_k, RoutingKind(*ROUTERS[family]))[0])
    assert type(pickle.loads(pickle.dumps(router))) is type(router).__bases__[1]


def test_gradients_reach_routers_through_the_familys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 0)
    router = router_of("qwen3_moe")
    assert mixin_for(router) is FewRowsRouter
    swap_class(router, FewRowsRouter)
    router(rows(2, router.weight.shape[1]))[1].sum().backward()
    assert router.weight.grad is not None


def adopted(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, FewRows)}


def test_a_patched_model_has_them_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 2**9)
    model = tiny_model("qwen3_moe").bfloat16()
    kinds = {path: type(module) for path, module in model.named_modules()}
    patching.patch(model, "1GiB", tiers=("int8", "fp16"))
    assert {"lm_head", "model.norm", "model.layers.0.self_attn.q_proj"} <= adopted(model)
    assert isinstance(model.model.layers[0].mlp.gate, FewRowsRouter)
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
