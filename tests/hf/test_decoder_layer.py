"""Few tokens pass decoder layers in two native calls, as they would module by module; all else is the layer's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import patching
import pytest
import tiny
import torch
from models import FAMILIES, is_known, tiny_model, tokens
from numerics import assert_close
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import dynaexq
from dynaexq.hf import decoder_layer
from dynaexq.hf.decoder_layer import FewTokensDecoderLayer, passes_natively
from dynaexq.hf.model_patch import restore_class
from dynaexq.kernels import Step
from dynaexq.kernels.cpu.build import load
from dynaexq.kernels.cpu.native_decoder import NativeDecoderLayer

ROUNDINGS = 2**-6  # weights of experts may be rounded to a neighbor, once per layer
PASSING = {"mellum", "mixtral", "qwen3_moe"}
"""Families whose layers are no more than attention and a sparse block."""

pytestmark = pytest.mark.skipif(load(True) is None, reason="needs the native kernel")


@pytest.fixture(autouse=True)
def _small_matrices_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.few_rows.SMALLEST", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every layer that is native, in two calls or with others."""
    found: list[int] = []
    before, step = NativeDecoderLayer.before_attention, NativeDecoderLayer.step

    def in_two_calls(layer: NativeDecoderLayer, hidden_states: Tensor, *angles: Tensor) -> Any:
        found.append(hidden_states.shape[0] * hidden_states.shape[1])
        return before(layer, hidden_states, *angles)

    def with_others(layer: NativeDecoderLayer, given: Step) -> Any:
        found.append(given.hidden_states.shape[0] * given.hidden_states.shape[1])
        return step(layer, given)

    monkeypatch.setattr(NativeDecoderLayer, "before_attention", in_two_calls)
    monkeypatch.setattr(NativeDecoderLayer, "step", with_others)
    return found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of every call for many."""
    found, run = list[int](), NativeDecoderLayer.run

    def counted(layer: NativeDecoderLayer, steps: Any, published: Any) -> None:
        found.append(len(steps))
        run(layer, steps, published)

    monkeypatch.setattr(NativeDecoderLayer, "run", counted)
    return found


def patched(model: PreTrainedModel | None = None, **options: Any) -> PreTrainedModel:
    model = tiny.tiny_qwen3_moe(num_attention_heads=4) if model is None else model
    patching.patch(model, "1GiB", device="cpu", **{"tiers": ("int4", "int8")} | options)
    return model


def module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FewTokensDecoderLayer, "_native_for", lambda *_: None)


steps = partial(tiny.steps, first=24, last=32)
"""The prompt is too many for the native way."""

PADDED = torch.ones(2, 32, dtype=torch.int64)
PADDED[0, :5] = 0
CASES: dict[str, dict[str, Any]] = {
    "a token at a time": {},
    "four at a time": {"count": 4},
    "left padding": {"mask": PADDED},
    "left padding, four at a time": {"mask": PADDED, "count": 4},
}


@pytest.mark.parametrize("dense", [None, "int8", "int4"])
@pytest.mark.parametrize("static", [False, True], ids=["a cache that grows", "a static cache"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_follows_a_prompt_is_as_module_by_module(case, static, dense, calls, monkeypatch):
    model = patched(dense=dense)

    def run() -> tuple[Tensor, Any]:
        before = model.dynaexq.devices[0].memory.counter.sums.clone()
        cache = StaticCache(config=model.config, max_cache_len=48) if static else None
        logits = steps(model, cache=cache, **case)[PADDED > 0 if "mask" in case else slice(None)]
        return logits, model.dynaexq.devices[0].memory.counter.sums - before

    got, counted = run()
    count = case.get("count", 1)
    assert calls == 8 // count * 2 * [2 * count]
    module_by_module(monkeypatch)
    expected, of_modules = run()
    assert_close("logits", expected, got, ROUNDINGS)
    assert torch.equal(counted[:, -1], of_modules[:, -1]), "tokens"
    assert_close("routing", of_modules.double(), counted.double(), 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass_or_keep_their_own(family, calls, monkeypatch):
    if not is_known(family):
        pytest.skip("this version of Transformers does not know it")
    model = tiny_model(family).bfloat16()
    if model.config._attn_implementation != "sdpa":
        pytest.skip("it does not attend through sdpa")
    patched(model)
    passing = [isinstance(module, FewTokensDecoderLayer) for module in model.modules()]
    assert any(passing) == (family in PASSING)
    with torch.no_grad():
        got = model(tokens()[:1, :3])[0]
        assert bool(calls) == any(passing)
        module_by_module(monkeypatch)
        assert_close(family, model(tokens()[:1, :3])[0], got, ROUNDINGS if calls else 0)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_generate_writes_the_same(way, calls, monkeypatch):
    model = patched()
    rows = 1 if "prompt_lookup_num_tokens" in way else 2

    def written() -> list[list[int]]:
        ids = tiny.prompt(rows, length=4)
        way["attention_mask"] = torch.ones_like(ids)
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, do_sample=False, **way).tolist()

    got = written()
    assert calls
    module_by_module(monkeypatch)
    assert written() == got


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)


def _wrap(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        forward = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda *args, of=forward: of(*args)


def _replace(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj)


def _add(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.dropout = nn.Identity()


def _train(model: PreTrainedModel) -> None:
    model.train()


def _attend_eagerly(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [_hook, _wrap, _replace, _add, _train, _attend_eagerly])
def test_who_changes_what_is_inside_finds_the_layers_own(change: Callable[[Any], None], calls):
    model, row = patched(), tiny.prompt(length=1)
    change(model)
    with torch.no_grad():
        model(row)
    assert not calls


def test_so_do_gradients_compilers_global_hooks_and_many_tokens(calls):
    model, row = patched(), tiny.prompt(1, length=1)
    with torch.no_grad():
        torch.compile(model, backend="eager")(row)
        model(tiny.prompt(1, length=17))
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            model(row)
        finally:
            handle.remove()
    model.model.embed_tokens.weight.requires_grad_()
    model(row).logits.sum().backward()
    assert not calls
    with torch.no_grad():
        model(row)
    assert calls


def test_outputs_from_inside_are_those_of_the_modules(calls):
    model, row = patched(), tiny.prompt(1, length=3)
    with torch.no_grad():
        plain = model(row)
        assert calls
        calls.clear()
        output = model(row, output_router_logits=True, output_hidden_states=True)
    assert not calls
    assert len(output.router_logits) == 2
    assert_close("logits", output.logits, plain.logits, ROUNDINGS)


def test_padding_that_is_known_is_left_out_of_what_is_counted(calls):
    model = patched()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        model(tiny.prompt(2, length=4), attention_mask=mask)
    assert not calls
    assert model.dynaexq.devices[0].memory.counter.sums[:, -1].tolist() == [6, 6]


@torch.no_grad()
def test_weights_that_others_change_or_replace_are_followed(calls, monkeypatch):
    model, row = patched(), tiny.prompt(1, length=2)
    model(row)
    layer = model.model.layers[0]
    layer.input_layernorm.weight.mul_(2)
    layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight * 0.5
    layer.self_attn.v_proj.weight = nn.Parameter(torch.randn_like(layer.self_attn.v_proj.weight))
    layer.mlp.gate.weight.data = torch.randn_like(layer.mlp.gate.weight)
    calls.clear()
    got = model(row).logits
    assert len(calls) == 2
    module_by_module(monkeypatch)
    assert_close("changed", model(row).logits, got, ROUNDINGS)


def test_a_model_gets_its_own_back():
    model = tiny.tiny_qwen3_moe()
    model(tiny.prompt(), output_router_logits=True)  # with this Transformers installs its hooks
    before = tiny.anatomy(model)
    patched(model, tiers=("int8", "fp16"))
    assert isinstance(model.model.layers[0], FewTokensDecoderLayer)
    dynaexq.unpatch(model)
    assert tiny.anatomy(model) == before


def test_exact_models_are_left_alone():
    assert not any(isinstance(module, FewTokensDecoderLayer) for module in patched(tiers=("fp16",)).modules())


def in_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FewTokensDecoderLayer, "_step", lambda *_: None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_over_a_cache_that_has_room_are_one_call(case, runs, monkeypatch):
    model, case = patched(), case | {"count": min(2, case.get("count", 1))}
    got = steps(model, **case)
    assert runs == [2] * (8 // case["count"] - 2), "the first to follow the prompt make room"
    in_two_calls(monkeypatch)
    runs.clear()
    assert torch.equal(steps(model, **case), got)
    assert not runs


def test_a_static_cache_is_attended_to_by_the_model(calls, runs):
    model = patched()
    steps(model, cache=StaticCache(config=model.config, max_cache_len=48))
    assert calls
    assert not runs


def _look(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    _between(layers, lambda output: seen.append(output.clone()))


def _change(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    _between(layers, lambda output: 2 * output)


def _change_in_place(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    _between(layers, lambda output: output.mul_(2))


def _keep(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    _between(layers, seen.append)


def _between(layers: nn.ModuleList, do: Callable[[Tensor], Tensor | None]) -> None:
    """Have a model do something between two of its layers."""
    kind: Any = type(layers[0])

    class First(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            changed = do(output)
            return output if changed is None else changed

    layers[0].__class__ = First


def _hook_a_layer(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    layers[0].register_forward_hook(lambda _, args, output: seen.append(output) or 2 * output)


def _hook_the_next(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))


def _leave_out(layers: nn.ModuleList, seen: list[Tensor]) -> None:
    del layers[1]


@pytest.mark.parametrize(
    "change", [_look, _change, _change_in_place, _keep, _hook_a_layer, _hook_the_next, _leave_out]
)
def test_who_looks_between_two_layers_sees_what_is_there(change, runs, monkeypatch):
    def run() -> tuple[Tensor, list[Tensor]]:
        model, seen = patched(), list[Tensor]()
        change(model.model.layers, seen)
        return steps(model), [one + 0 for one in seen]

    got, seen = run()
    assert runs
    in_two_calls(monkeypatch)
    expected, seen_in_turn = run()
    assert torch.equal(got, expected)
    assert len(seen) == len(seen_in_turn)
    assert all(map(torch.equal, seen, seen_in_turn))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_layer_finds_the_cache_written(hook: str) -> None:
    model, lengths = patched(), list[float]()
    layers, cache = model.model.layers, DynamicCache(config=model.config)

    def look(*_: Any) -> None:
        lengths.append(float(cache.layers[0].keys.abs().sum(-1).min()))

    getattr(layers[hook == "register_forward_pre_hook"], hook)(look)
    steps(model, cache=cache)
    before = cache.layers[0].keys.abs().sum(-1).min()
    assert len(lengths) == 9
    assert min(lengths) >= float(before) > 0, "no key is still to be written"


def test_precision_moves_between_forwards_and_not_within(runs):
    model = patched(tiers=("int2", "int4"), update_interval=1)
    runtime = model.dynaexq
    ticks = runtime.devices[0].ticks
    steps(model)
    assert runtime.devices[0].ticks - ticks == 9
    assert runs == [2] * len(runs)


def _clipped(layer: Any) -> None:
    _twist(layer.self_attn, lambda forward: lambda rows, **kwargs: forward(rows.clamp(-100, 100), **kwargs))


def _scaled(layer: Any) -> None:
    _twist(layer, lambda forward: lambda rows, **kwargs: rows + 0.5 * (forward(rows, **kwargs) - rows))


def _shared(layer: Any) -> None:
    _twist(layer.mlp, lambda forward: lambda rows: forward(rows) + rows)


def _weighted(layer: Any) -> None:
    gate, experts = layer.mlp.gate, layer.mlp.experts

    def forward(rows: Tensor) -> Tensor:
        _, weights, ids = gate(rows[0])
        return experts(rows[0], ids, 2.5 * weights)[None]

    _twist(layer.mlp, lambda _: forward)


def _twist(module: nn.Module, twist: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    forward = twist(module.forward)

    class Twisted(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

    module.__class__ = Twisted


@pytest.mark.parametrize("twist", [_clipped, _scaled, _shared, _weighted])
def test_a_layer_that_does_something_else_is_not_taken(twist: Callable[[Any], None]) -> None:
    layer = patched().model.layers[0]
    restore_class(layer)
    assert passes_natively(layer)
    decoder_layer.forgotten(layer)
    twist(layer)
    assert not passes_natively(layer)
    assert not any(name in vars(layer) for name in decoder_layer.OWN)
