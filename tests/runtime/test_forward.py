"""One forward pass of a patched model: every door observes and ticks, it compiles whole, gradients flow through it."""

import gc

import patching
import pytest
import torch
from models import tiny_model, tokens
from numerics import assert_close
from tiny import prompt, tiny_qwen3_moe
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from transformers import PreTrainedModel

import dynaexq
from dynaexq.kernels.custom_op import experts, experts_backward
from dynaexq.memory import RoutingCounter

DOORS = {
    "model(x)": lambda model: model(tokens()),
    "model.forward(x)": lambda model: model.forward(tokens()),
    "model.model(x)": lambda model: model.model(tokens()),
}

# Where gradients of several paths meet, they may be added up in another order.
GRADIENT_TOLERANCE = 1e-6


def patch(model: PreTrainedModel, *tiers: str) -> dynaexq.Runtime:
    return patching.patch(model, "1GiB", tiers=tiers, device="cpu", update_interval=1)


def assert_observed(runtime: dynaexq.Runtime, steps: int) -> None:
    """Every step has ticked once, and its tick has seen the tokens of the steps before."""
    stats = runtime.stats()
    assert (stats["steps"], stats["ticks"], stats["tokens"]) == (steps, steps, (steps - 1) * tokens().numel())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    for name, gradient in got.items():
        assert_close(name, reference[name], gradient, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_door_into_a_model_observes_and_ticks_once_a_step(door):
    model = tiny_model("qwen3_moe")
    runtime = patch(model, "fp16")
    for steps in (1, 2, 3):
        door(model)
        assert_observed(runtime, steps)


@torch.no_grad()
def test_one_token_of_one_choice_is_counted_by_the_kernel(monkeypatch):
    model = tiny_qwen3_moe(num_experts_per_tok=1)
    runtime = patch(model, "int4")
    monkeypatch.setattr(RoutingCounter, "observe", lambda *_: pytest.fail("a dozen operators for one number"))
    for _ in range(3):
        model(prompt()[:1, :1])
    assert runtime.stats()["tokens"] == 2


@torch.no_grad()
@pytest.mark.parametrize("among_ranks", [True, False])
def test_a_row_of_zeros_stands_for_no_tokens_where_ranks_exchange_them(among_ranks):
    model = tiny_qwen3_moe()
    runtime = patching.patch(model, "1GiB", tiers=("int4",), device="cpu", update_interval=100)
    experts = model.model.layers[0].mlp.experts
    experts._ports.exchanges_tokens = among_ranks
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for rows in (torch.zeros(1, 64), torch.ones(1, 64)):
        experts(rows.bfloat16(), torch.tensor([[3]]), one)
    mass, _ = runtime.devices[0].memory.counter.drain()
    assert mass[0, 3] == (1 if among_ranks else 2)


def test_router_logits_are_recorded_as_before():
    model = tiny_model("qwen3_moe")
    before = model(tokens(), output_router_logits=True)
    patch(model, "fp16")
    after = model(tokens(), output_router_logits=True)
    assert len(after.router_logits) == len(before.router_logits) == model.config.num_hidden_layers
    assert all(torch.equal(*pair) for pair in zip(after.router_logits, before.router_logits, strict=True))
    assert torch.equal(after.aux_loss, before.aux_loss)


@torch.no_grad()
def test_a_compiled_model_is_one_graph_that_answers_the_same_and_still_observes_and_ticks():
    model = tiny_model("qwen3_moe")
    runtime = patch(model, "int4", "int8")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for steps in (1, 2):
        got = compiled(tokens(), output_router_logits=True)
        assert_observed(runtime, steps)
    expected = model(tokens(), output_router_logits=True)  # afterwards, so that it prepared nothing for the compiler
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.aux_loss, expected.aux_loss)


def test_a_compiled_model_is_one_graph_backwards_too():
    model = tiny_model("qwen3_moe")
    patch(model, "int4", "int8")
    before = gradients(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same_gradients(gradients(model), before)


def test_a_forgotten_model_may_be_collected_while_another_one_is_traced():
    model = tiny_model("qwen3_moe")
    patch(model, "int4", "int8")
    with FakeTensorMode():
        del model
        gc.collect()


def test_the_operator_keeps_the_contract_of_an_operator():
    model = tiny_model("qwen3_moe")
    patch(model, "int2", "int4")
    rows, weights = torch.randn(5, 64, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    index = torch.rand(5, 8).argsort(1)[:, :2]
    handle = model.model.layers[0].mlp.experts._handle
    opcheck(torch.ops.dynaexq.experts.default, (rows, index, weights, handle))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_lie_row_by_row_however_the_rows_lie_as_a_compiler_is_told(dtype: torch.dtype) -> None:
    model = tiny_qwen3_moe(dtype)
    patch(model, "int4")
    handle = model.model.layers[0].mlp.experts._handle
    ids, weights = torch.tensor([[0, 1]] * 5), torch.full((2, 5), 0.5, dtype=dtype).t()
    for rows in (torch.randn(5, 64, dtype=dtype), torch.randn(64, 5, dtype=dtype).t()):
        arguments = rows, ids, weights
        real = [experts(*arguments, handle), *experts_backward(rows, *arguments, handle)]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(argument) for argument in arguments]
            told = [experts(*fakes, handle), *experts_backward(fakes[0], *fakes, handle)]
        for one, other in zip(real, told, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        compiled = torch.compile(lambda x: experts(x * 1, ids, weights, handle).sum(1), backend="aot_eager")
        torch.testing.assert_close(compiled(rows), experts(rows, ids, weights, handle).sum(1))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
@pytest.mark.parametrize("recompute", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_in_training_dense_weights_get_the_gradients_they_got_and_a_token_counts_once(family, recompute):
    model = tiny_model(family).train()
    if recompute is not None:
        model.gradient_checkpointing_enable(recompute)
        model.enable_input_require_grads()
    before = gradients(model)
    runtime = patch(model, "fp16")
    after = gradients(model)
    assert after.keys() == before.keys() & dict(model.named_parameters()).keys()
    assert_same_gradients(after, before)
    runtime.tick()
    assert (runtime.stats()["steps"], runtime.stats()["tokens"]) == (1, tokens().numel())
