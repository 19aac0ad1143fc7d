"""A patched model among its neighbors: moved, copied, saved, hooked, shared by threads, closed, unpatched."""

import copy
import gc
import io
import pickle
import queue
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import patching
import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.quantizers.base import HfQuantizer

import dynaexq
from dynaexq.errors import ClosedError, PatchError, UnpatchError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.views.words import size

AMPLE = 10**6

KEEPING = {  # pairs that keep the 16-bit experts, and where
    "fp16": {"tiers": ("fp16",)},
    "int4-fp16-ram": {"tiers": ("int4", "fp16")},
    "int4-fp16-disk": {"tiers": ("int4", "fp16"), "host_copy": "disk"},
    "int2-fp16-no-slots": {"tiers": ("int2", "fp16"), "hbm_budget": 112_000},
}
keeping = pytest.mark.parametrize("options", KEEPING.values(), ids=KEEPING)


def patched(tiers: tuple[str, ...] = ("int2", "int4"), **options: Any) -> nn.Module:
    """A tiny patched model with room for half the upgrades."""
    model = tiny.tiny_qwen3_moe()
    rt = patching.patch(model, AMPLE, **{"tiers": tiers, "quantizer": "rtn"} | options)
    memory = rt.memory()
    rt.set_budget(memory["total"] - memory["upgrade"] // 2)
    return model


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to("cpu"), lambda m: m.to(torch.bfloat16), lambda m: m.cpu(), lambda m: m.bfloat16()],
    ids=["to-cpu", "to-bfloat16", "cpu", "bfloat16"],
)
def test_a_move_to_where_it_is_changes_nothing(move: Callable[[nn.Module], nn.Module]) -> None:
    model = patched()
    before = tiny.logits(model)
    assert move(model) is model
    assert torch.equal(tiny.logits(model), before)


REFUSED_MOVES: dict[str, Callable[[nn.Module], object]] = {
    "to-float16": lambda m: m.to(torch.float16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to-meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "half of the backbone": lambda m: m.model.half(),
    "half of the layers": lambda m: m.model.layers.half(),
    "half of a layer": lambda m: m.model.layers[1].half(),
    "half of a block": lambda m: m.model.layers[1].mlp.half(),
    "half of the experts": lambda m: m.model.layers[1].mlp.experts.half(),
}


@pytest.mark.parametrize("move", REFUSED_MOVES.values(), ids=REFUSED_MOVES)
def test_a_conversion_is_refused_before_anything_is_converted(move: Callable[[nn.Module], object]) -> None:
    model = patched()
    before, answer = tiny.anatomy(model), tiny.logits(model)
    with pytest.raises(
        PatchError, match=r"expected a patched model to stay in torch.bfloat16 on cpu, asked for .* on "
    ):
        move(model)
    assert tiny.anatomy(model) == before
    assert torch.equal(tiny.logits(model), answer)


@pytest.mark.parametrize("move", ["to-float16", "half", "half of the layers", "to-meta"])
def test_what_contains_parts_that_were_patched_one_by_one_refuses_before_anything_is_converted(move: str) -> None:
    model = tiny.tiny_qwen3_moe()
    outer = Wrapper(model)
    for layer in model.model.layers:
        dynaexq.patch(layer, "1GiB", tiers=("int4", "fp16"))
    before = tiny.anatomy(model)
    for module in (model, outer) if move in ("to-float16", "half", "to-meta") else (model,):
        with pytest.raises(PatchError, match="expected a patched model to stay in"):
            REFUSED_MOVES[move](module)
    assert tiny.anatomy(model) == before
    for layer in model.model.layers:
        assert "_apply" in outer.__dict__
        dynaexq.unpatch(layer)
    assert not any({"_apply", "__reduce_ex__"} & set(module.__dict__) for module in outer.modules())
    outer.half()


COPIES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "deepcopy": (copy.deepcopy, "neither copied nor pickled: .* copy or save the original model"),
    "deepcopy of a block": (lambda m: copy.deepcopy(m.model.layers[0].mlp), "neither copied nor pickled"),
    "pickle": (pickle.dumps, "neither copied nor pickled"),
    "pickle of a block": (lambda m: pickle.dumps(m.model.layers[0].mlp), "neither copied nor pickled"),
    "torch.save": (lambda m: torch.save(m, io.BytesIO()), "neither copied nor pickled"),
}


@pytest.mark.parametrize(("make", "match"), COPIES.values(), ids=COPIES)
def test_a_patched_model_cannot_be_copied(make: Callable[[nn.Module], object], match: str) -> None:
    model = patched()
    with pytest.raises(PatchError, match=match):
        make(model)
    tiny.generated(model)


class Wrapper(nn.Module):
    """A module of someone's that holds a Transformers model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


def savers(directory: Path) -> dict[str, Callable[[nn.Module], Any]]:
    """Ways to save a model that know nothing of dynaexq."""
    return {
        "save_pretrained": lambda model: model.save_pretrained(directory / "outer"),
        "torch.save": lambda model: torch.save(model.state_dict(), directory / "weights.pt"),
        "safetensors": lambda model: save_file(dict(model.state_dict()), directory / "weights.safetensors"),
        "safetensors, a model": lambda model: save_model(model, str(directory / "model.safetensors")),
        "accelerate": lambda model: accelerate.Accelerator().save_model(model, directory / "accelerate"),
        "deepcopy": lambda model: copy.deepcopy(model.state_dict()),
    }


@pytest.mark.parametrize("saver", savers(Path()))
@pytest.mark.parametrize("inner", ["a part", "a layer at a time"])
def test_a_model_of_which_a_part_was_patched_is_not_saved_without_its_experts(
    saver: str, inner: str, tmp_path: Path
) -> None:
    model = tiny.tiny_qwen3_moe()
    for part in [model.model] if inner == "a part" else model.model.layers:
        dynaexq.patch(part, "1GiB")
    with pytest.raises(PatchError, match="the model is patched by dynaexq and they are packed"):
        savers(tmp_path)[saver](model)
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.stat().st_size]


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_a_model_in_a_wrapper_is_saved_whole_by_its_own_save_pretrained(wrap: Any, tmp_path: Path) -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    outer = wrap(model)
    runtime = dynaexq.patch(outer, "1GiB", tiers=("int4", "int8"))
    assert outer.dynaexq is model.dynaexq is runtime
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path / "model")), tiny.logits(model))
    with pytest.raises(PatchError, match="is patched already"):
        dynaexq.patch(outer, "1GiB")


def test_a_model_outlives_the_wrapper_that_was_patched(tmp_path: Path) -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    answer = tiny.logits(model)
    runtime = dynaexq.patch(Wrapper(model), "1GiB", tiers=("fp16",))
    gc.collect()
    assert runtime.memory()["dense"] > 0
    assert runtime.memory()["total"] == runtime.plan.total
    model.save_pretrained(tmp_path)
    dynaexq.unpatch(model)
    torch.testing.assert_close(tiny.logits(model), answer)


def test_unpatching_a_wrapper_leaves_nothing_on_the_model_within() -> None:
    model, answer = tiny.tiny_qwen3_moe(), tiny.logits(tiny.tiny_qwen3_moe())
    outer = Wrapper(model)
    dynaexq.patch(outer, "1GiB", tiers=("int4", "fp16"))
    dynaexq.unpatch(outer)
    for module in (outer, model):
        assert not {"dynaexq", "hf_quantizer", "save_pretrained", "_dynaexq_patch"} & set(module.__dict__)
    assert torch.equal(tiny.logits(model), answer)


def test_the_state_dict_names_the_experts_holds_the_dense_weights_and_loads_again() -> None:
    model = patched()
    state, answer = {name: t.to("cpu").clone() for name, t in model.state_dict().items()}, tiny.logits(model)
    assert list(state) == list(tiny.tiny_qwen3_moe().state_dict())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.load_state_dict(state) is not None
    assert torch.equal(tiny.logits(model), answer)
    absent = state["model.layers.0.mlp.experts.down_proj"]
    assert absent.numel() == 1, "of a shape that fits no model"
    with pytest.raises(PatchError, match="save with save_pretrained of the Transformers model that was patched"):
        absent + 1


def test_train_and_eval_reach_every_module() -> None:
    model = patched()
    assert all(module.training for module in model.train().modules())
    assert tiny.logits(model).isfinite().all()
    assert not any(module.training for module in model.eval().modules())


def test_a_printed_model_shows_where_it_was_patched() -> None:
    model = patched()
    assert "(mlp): DynaExqMoE[Qwen3MoeSparseMoeBlock](" in repr(model)
    assert "(experts): MixedPrecisionExperts[Qwen3MoeExperts](" in repr(model)
    for block, original in zip(tiny.sparse_blocks(model), tiny.sparse_blocks(tiny.tiny_qwen3_moe()), strict=True):
        assert isinstance(block, type(original))
        assert isinstance(block, dynaexq.DynaExqMoE)
        assert isinstance(block.experts, type(original.experts))


@keeping
def test_unpatch_is_exact(options: dict[str, Any]) -> None:
    model = tiny.tiny_qwen3_moe()
    frozen = tiny.sparse_blocks(model)[0].experts.down_proj.requires_grad_(False)
    tiny.generated(model)
    answer = model(tiny.prompt(), output_router_logits=True)  # with this Transformers installs its hooks
    before = tiny.anatomy(model)
    rt = patching.patch(model, **{"hbm_budget": AMPLE, "quantizer": "rtn"} | options)
    tiny.generated(model)
    dynaexq.unpatch(model)

    after = tiny.anatomy(model)
    assert {key: part if "tensor" not in key else part[1:] for key, part in after.items()} == {
        key: part if "tensor" not in key else part[1:] for key, part in before.items()
    }, "all but the identity of tensors is as it was"
    again = model(tiny.prompt(), output_router_logits=True)
    assert torch.equal(again.logits, answer.logits)
    assert len(again.router_logits) == len(answer.router_logits) == 2
    assert not hasattr(model, "dynaexq")
    assert not frozen.requires_grad
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters()), "a slab is kept alive"
    with pytest.raises(ClosedError):
        rt.tick()
    with pytest.raises(PatchError, match="not patched; there is nothing to undo"):
        dynaexq.unpatch(model)
    copy.deepcopy(model).half()  # no guard stays behind
    assert dynaexq.patch(model, AMPLE, tiers=("int4",)) is model.dynaexq


def tiny_gpt_oss() -> nn.Module:
    """Its experts are stored `[in, out]` and have biases."""
    torch.manual_seed(7)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.2,
        )
    ).eval()


@keeping
def test_unpatch_is_exact_for_transposed_experts_with_biases(options: dict[str, Any]) -> None:
    model = tiny_gpt_oss()
    answer, before = tiny.logits(model), model.state_dict()
    patching.patch(model, **options | {"hbm_budget": AMPLE, "quantizer": "rtn"})
    dynaexq.unpatch(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].stride() == before[name].stride() for name in before)
    assert torch.equal(tiny.logits(model), answer)


def test_unpatch_gives_back_the_very_parameters_that_were_kept() -> None:
    model = tiny.tiny_qwen3_moe()
    before = tiny.anatomy(model)
    dynaexq.patch(model, AMPLE, tiers=("int4", "fp16"))
    dynaexq.unpatch(model)
    assert all(after[0] == before[key][0] for key, after in tiny.anatomy(model).items() if "tensor" in key)


@keeping
def test_a_closed_runtime_can_be_unpatched_where_the_weights_are_still_there(options: dict[str, Any]) -> None:
    model = tiny.tiny_qwen3_moe()
    answer = tiny.logits(model)
    patching.patch(model, **{"hbm_budget": AMPLE, "quantizer": "rtn"} | options).close()
    if options.get("host_copy") == "disk":
        with pytest.raises(UnpatchError, match=r"are gone: .* or their copy by close; load the model again"):
            dynaexq.unpatch(model)
        assert tiny.generated(model)
    else:
        dynaexq.unpatch(model)
        assert torch.equal(tiny.logits(model), answer)


@pytest.mark.parametrize("tiers", [("int2",), ("int4",), ("int2", "int4"), ("int4", "int8")], ids="-".join)
def test_unpatch_without_the_weights_is_refused_and_the_model_works_on(tiers: tuple[str, ...]) -> None:
    model = patched(tiers)
    before, answer = tiny.anatomy(model), tiny.logits(model)
    with pytest.raises(UnpatchError, match=r"are gone: with tiers=\('int.* they were freed by patch"):
        dynaexq.unpatch(model)
    assert tiny.anatomy(model) == before
    assert torch.equal(tiny.logits(model), answer)
    assert model.dynaexq.tick()


class CountingHook(ModelHook):
    """Counts what passes; keeps hold of nothing."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.before += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.after += 1
        return output


@pytest.mark.parametrize("where", ["block", "experts"])
def test_hooks_of_accelerate_survive_patch_and_unpatch(where: str) -> None:
    model = tiny.tiny_qwen3_moe()
    modules = [block if where == "block" else block.experts for block in tiny.sparse_blocks(model)]
    counting = CountingHook()
    add_hook_to_module(modules[0], counting)
    add_hook_to_module(modules[1], AlignDevicesHook(execution_device="cpu"))
    answer, before = tiny.logits(model), tiny.anatomy(model)
    for forwards in (1, 3):
        dynaexq.patch(model, AMPLE, tiers=("fp16",))
        assert torch.equal(tiny.logits(model), answer), "every expert is at 16 bits"
        assert counting.before == counting.after == forwards + 1
        assert modules[0]._hf_hook is counting
        dynaexq.unpatch(model)
        assert torch.equal(tiny.logits(model), answer)
        assert counting.before == counting.after == forwards + 2
    assert modules[0]._hf_hook is counting
    for module in modules:
        remove_hook_from_module(module)
    assert torch.equal(tiny.logits(model), answer)
    assert type(modules[0]) is before[f"module model.layers.0.mlp{'.experts' if where == 'experts' else ''}"][0]


def test_a_hook_that_was_removed_leaves_nothing_that_stands_in_the_way() -> None:
    model = tiny.tiny_qwen3_moe()
    for block in tiny.sparse_blocks(model):
        remove_hook_from_module(add_hook_to_module(block.experts, CountingHook()))
    answer = tiny.logits(model)
    dynaexq.patch(model, AMPLE, tiers=("fp16",))
    assert torch.equal(tiny.logits(model), answer)
    assert model.dynaexq.stats()["steps"] == 1, "the experts' old forward was called"


def test_router_logits_are_recorded_once() -> None:
    model = tiny.tiny_qwen3_moe()
    expected = model.model(tiny.prompt(), output_router_logits=True, output_hidden_states=True)
    dynaexq.patch(model, AMPLE, tiers=("fp16",))
    found = model.model(tiny.prompt(), output_router_logits=True, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert len(found.router_logits) == len(expected.router_logits) == 2
    assert all(map(torch.equal, found.router_logits, expected.router_logits))


class OtherQuantizer(HfQuantizer):
    """Stands for the one that loaded the dense weights in 4 bits."""

    def __init__(self, trainable: bool):
        super().__init__(DynaExqConfig())
        self._trainable = trainable

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self._trainable


@pytest.mark.parametrize("trainable", [True, False])
def test_a_quantizer_that_was_there_is_wrapped_and_given_back(trainable: bool) -> None:
    model = tiny.tiny_qwen3_moe()
    model.hf_quantizer = other = OtherQuantizer(trainable)
    dynaexq.patch(model, AMPLE, tiers=("fp16",))
    assert model.hf_quantizer.wrapped is other
    assert model.hf_quantizer.is_trainable == trainable
    assert not model.hf_quantizer.is_compileable
    assert model.hf_quantizer.quantization_config.quant_method == "dynaexq"
    with pytest.raises(
        PatchError, match="were quantized by OtherQuantizer, so the model cannot be dequantized in place"
    ):
        model.dequantize()
    dynaexq.unpatch(model)
    assert model.hf_quantizer is other


def test_the_runtime_closes_at_the_end_of_its_block() -> None:
    model = tiny.tiny_qwen3_moe()
    with dynaexq.patch(model, AMPLE, tiers=("int2", "int4")) as rt:
        assert rt.tick()
    with pytest.raises(ClosedError):
        rt.tick()


@pytest.mark.parametrize("host_copy", ["ram", "disk"])
def test_a_closed_runtime_refuses_and_its_model_answers_on(host_copy: str) -> None:
    model = patched(host_copy=host_copy, update_interval=1)
    rt = model.dynaexq
    answer, tiers = tiny.logits(model), rt.tiers()
    rt.close()
    rt.close()
    stats = rt.stats()
    for refused in (rt.tick, rt.thaw, rt.drain, lambda: rt.set_budget(AMPLE)):
        with pytest.raises(ClosedError, match="was closed; patch the model again"):
            refused()
    rt.freeze()
    assert tiny.generated(model)
    assert torch.equal(tiny.logits(model), answer)
    assert np.array_equal(rt.tiers(), tiers)
    assert rt.stats() == stats | {"steps": rt.stats()["steps"]}
    assert str(rt.report())
    assert rt.memory()["total"] <= rt.memory()["budget"]


def test_freeze_stops_every_change_and_thaw_lets_them_go_on() -> None:
    model = patched(update_interval=1, half_life=8)
    rt = model.dynaexq
    cold = tiny.cold_routes(model)
    rt.freeze()
    tiers, text = rt.tiers(), tiny.generated(model, new_tokens=20)
    tiny.steer(model, cold)
    for _ in range(20):
        tiny.logits(model)
    assert np.array_equal(rt.tiers(), tiers)
    tiny.steer(model, None)
    assert tiny.generated(model, new_tokens=20) == text
    tiny.steer(model, cold)
    rt.thaw()
    for _ in range(5):
        tiny.logits(model)
    assert all((row[hot] == 4).all() for row, (hot,) in zip(rt.tiers(), cold, strict=True))


def test_drain_leaves_nothing_in_flight() -> None:
    model = patched(update_interval=1)
    tiny.generated(model)
    model.dynaexq.drain()
    assert model.dynaexq.stats()["in_flight"] == 0


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "fp16")], ids="-".join)
def test_a_forgotten_model_takes_its_slabs_with_it(tiers: tuple[str, ...]) -> None:
    model = patched(tiers)
    tiny.generated(model)
    block = tiny.sparse_blocks(model)[0]
    traces = [
        weakref.ref(x) for x in (model, model.dynaexq, block, block.pool, block.pipeline, block.experts._layer.base)
    ]
    del model, block
    gc.collect()
    assert not [trace() for trace in traces if trace() is not None]


def test_a_runtime_that_outlives_its_model_holds_no_dense_weights() -> None:
    model = patched()
    rt, trace = model.dynaexq, weakref.ref(model)
    del model
    gc.collect()
    assert trace() is None
    assert rt.memory()["dense"] == 0
    assert rt.tick()


def test_a_block_shows_its_row_of_the_runtime() -> None:
    model = patched(update_interval=1)
    rt = model.dynaexq
    tiny.generated(model)
    blocks = tiny.sparse_blocks(model)
    for layer, block in enumerate(blocks):
        assert np.array_equal(block.tiers, rt.tiers()[layer])
        assert np.array_equal(block.hotness, rt.hotness()[layer])
        assert np.array_equal(block.tracker.hotness, rt.hotness())
        assert block.controller.gain.shape == rt.tiers().shape
        assert block.pool.num_slots == rt.stats()["slots"]
        assert block.pipeline.upgraded.sum() == rt.stats()["upgraded"]
    shared = ("tracker", "controller", "pipeline", "pool")
    assert all(getattr(blocks[0], name) is getattr(blocks[1], name) for name in shared)
    blocks[0].hotness[:] = -1
    assert (rt.hotness() >= 0).all(), "a caller's array is a copy"


def test_the_report_can_be_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = patched(update_interval=1)
    tiny.generated(model)
    report = model.dynaexq.report()
    printed = str(report)
    total = model.dynaexq.memory()["total"]
    for line in ("int2 + int4", size(total), "experts at 2 bits", "experts at 4 bits", "hot coverage"):
        assert line in printed
    assert repr(report) == printed
    assert "\x1b" not in printed
    html = report._repr_html_()
    assert size(total) in html
    assert "\x1b" not in html
    assert set(re.findall(r"[^-]color:([^;}]+)", html)) == {"inherit", "#c33"}, "it is read on white and on black"
    assert set(re.findall(r"background:([^;}]+)", html)) == {"none"}
    assert capsys.readouterr().out == "", "a notebook shows the table once"
    for words in (model.dynaexq.verdict(), model.dynaexq.health()):
        shown: list[str] = []
        words._repr_pretty_(SimpleNamespace(text=shown.append), cycle=False)
        assert shown == [str(words)]
    assert repr(model.dynaexq) == f"Runtime(int2 + int4, 8 of 16 experts upgraded, {total:,} of {total:,} bytes)"


def test_two_threads_that_generate_at_once_get_what_each_gets_alone() -> None:
    model = patched(update_interval=1)
    model.dynaexq.freeze()
    prompts = [tiny.prompt(seed=seed) for seed in (1, 2)]
    alone = [model.generate(ids, max_new_tokens=8, do_sample=False).tolist() for ids in prompts]
    found: list[list[Any]] = [[], []]

    def work(which: int) -> None:
        for _ in range(10):
            found[which].append(model.generate(prompts[which], max_new_tokens=8, do_sample=False).tolist())

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[text] * 10 for text in alone]
    model.dynaexq.tick()
    fed = 11 * 2 * (12 * 2 + 7 * 2)  # rounds, threads, tokens of the prompt and of what followed
    assert model.dynaexq.stats()["tokens"] == fed


def test_a_runtime_may_be_closed_while_the_model_generates() -> None:
    model, stop, answers = patched(update_interval=1), threading.Event(), queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            answers.put(tiny.generated(model))

    thread = threading.Thread(target=work)
    thread.start()
    answers.get(timeout=60)
    model.dynaexq.close()
    backlog = answers.qsize()
    for _ in range(backlog + 3):
        answers.get(timeout=60)  # raises where generation stopped
    stop.set()
    thread.join()


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "fp16")], ids="-".join)
def test_inference_mode_may_begin_and_end_anywhere(tiers: tuple[str, ...]) -> None:
    model = tiny.tiny_qwen3_moe()
    with torch.inference_mode():
        options = {"quantizer": "rtn", "update_interval": 1, "half_life": 8, "num_kinds": 1}
        rt = patching.patch(model, 150_000, tiers=tiers, **options)
        tiny.logits(model)
        rt.set_budget(200_000)
    tiny.steer(model, [[[0, 1]], [[2, 3]]])
    for _ in range(4):
        tiny.logits(model)
    with torch.inference_mode():
        tiny.steer(model, [[[4, 5]], [[6, 7]]])
        for _ in range(4):
            tiny.logits(model)
    assert (rt.tiers()[[0, 0, 1, 1], [4, 5, 6, 7]] == rt.plan.upgrade.bits).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_was_loaded_in_inference_mode_goes_on_outside(packed: bool, tmp_path: Path) -> None:
    tiny.tiny_qwen3_moe().save_pretrained(tmp_path)
    config = DynaExqConfig(hbm_budget="1GiB", tiers=("int2", "int4"), quantizer="rtn", update_interval=1)
    if packed:
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).save_pretrained(tmp_path / "packed")
    with torch.inference_mode():
        model = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
            if packed
            else AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        )
    runtime = model.dynaexq
    assert tiny.logits(model).isfinite().all()
    runtime.set_budget(runtime.memory()["total"] - runtime.memory()["upgrade"] // 2)
    assert runtime.stats()["demotions"] > 0
    assert tiny.logits(model).isfinite().all()


@pytest.mark.parametrize("way", ["patched", "in a wrapper", "loaded"])
def test_what_no_one_holds_any_more_is_freed_at_once(way: str, tmp_path: Path) -> None:
    """Without garbage collection: the next model would meet the slabs of this one."""
    options: dict[str, Any] = {"tiers": ("int4", "int8"), "hbm_budget": AMPLE}
    model: Any = tiny.tiny_qwen3_moe()
    if way == "loaded":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=DynaExqConfig(**options))
    else:
        model = Wrapper(model) if way == "in a wrapper" else model
        patching.patch(model, **options)
    gc.collect()
    gc.disable()
    try:
        model(tiny.prompt())
        device = model.dynaexq.devices[0]
        parts = (model, model.dynaexq, device, device.pipeline, device.memory, device.memory.pool)
        seen = [weakref.ref(part) for part in parts]
        del device, parts, model
        assert [type(part()).__name__ for part in seen if part() is not None] == []
    finally:
        gc.enable()
