"""What cannot be patched is refused by a named error with a sentence, and stays as it was, bit for bit."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import patching
import pytest
import tiny
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

import dynaexq
import dynaexq.hf.model_patch
import dynaexq.hf.patcher
from dynaexq.errors import (
    BudgetError,
    DynaExqError,
    PatchError,
    QuantizationError,
    SettingsError,
    UnsupportedModelError,
)
from dynaexq.kernels.cpu.build import load
from dynaexq.memory import RamStore
from dynaexq.quantization import ExpertCodec
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.experts import MixedPrecisionExperts

AMPLE = 10**6


@contextmanager
def refused(model: nn.Module, error: type[DynaExqError], match: str, runs: bool = True) -> Iterator[None]:
    """The block raises `error`, and leaves `model` what it was; if it `runs`, it also answers as before."""
    answer = tiny.generated(model) if runs else None
    before = tiny.anatomy(model)
    with pytest.raises(error, match=match):
        yield
    assert tiny.anatomy(model) == before
    if runs:
        assert tiny.generated(model) == answer


OPTIONS: dict[str, tuple[dict[str, Any], type[DynaExqError], str]] = {
    "no unit that there is": ({"hbm_budget": "20 GBit"}, SettingsError, "'20 GBit'; write a number and B, KB"),
    "no bytes": ({"hbm_budget": 0}, SettingsError, "positive number of bytes .* got 0"),
    "fewer than none": ({"hbm_budget": -5}, SettingsError, "got -5"),
    "not a number": ({"hbm_budget": math.nan}, SettingsError, "got nan"),
    "a truth value": ({"hbm_budget": True}, SettingsError, "got True"),
    "too small": ({"hbm_budget": "10KiB"}, BudgetError, r"raise hbm_budget to at least \d+"),
    "too small for this pair": ({"hbm_budget": 120_000, "tiers": ("fp16",)}, BudgetError, r'take tiers=\("int2",\)'),
    "unknown tier": ({"tiers": ("int4", "int3")}, SettingsError, "'int3'"),
    "descending tiers": ({"tiers": ("int8", "int4")}, SettingsError, r"did you mean \('int4', 'int8'\)"),
    "repeated tier": ({"tiers": ("int4", "int4")}, SettingsError, r"each once"),
    "alpha and half_life": ({"alpha": 0.9, "half_life": 512}, SettingsError, "not both"),
    "unknown option": (
        {"tier": ("int4",)},
        SettingsError,
        "unknown option tier; did you mean tiers",
    ),
    "a device without kernels": ({"device": "meta"}, SettingsError, "'meta': no kernels"),
    "a device unknown to torch": ({"device": "tpu"}, SettingsError, r'"cpu" or "cuda\[:index\]", got \'tpu\''),
    "page-locked memory on a CPU": ({"device": "cpu", "host_copy": "pinned"}, SettingsError, 'use host_copy="ram"'),
}


@pytest.mark.parametrize(("options", "error", "match"), OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_refused(options: dict[str, Any], error: type[DynaExqError], match: str) -> None:
    model = tiny.tiny_qwen3_moe()
    with refused(model, error, match):
        patching.patch(model, **{"hbm_budget": AMPLE} | options)


def test_a_config_of_another_kind_is_refused_and_a_dict_is_one() -> None:
    model = tiny.tiny_qwen3_moe()
    with refused(model, SettingsError, "a dict of options, got str; write config=DynaExqConfig"):
        dynaexq.patch(model, AMPLE, config="int4")
    with refused(model, SettingsError, "unknown option hysterisis; did you mean hysteresis"):
        dynaexq.patch(model, AMPLE, config={"hysterisis": 3})
    assert dynaexq.patch(model, AMPLE, config={"hysteresis": 3}).settings.hysteresis == 3


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny.tiny_qwen3_moe()
    with refused(model, SettingsError, 'finds no CUDA device; use device="cpu"'):
        dynaexq.patch(model, AMPLE, device="cuda")


def test_a_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model = tiny.tiny_qwen3_moe()
    with refused(model, SettingsError, "'cuda:2' was asked for, but there are 2, numbered from 0"):
        dynaexq.patch(model, AMPLE, device="cuda:2")


def test_powers_of_1000_are_not_powers_of_1024() -> None:
    model = tiny.tiny_qwen3_moe()
    with pytest.raises(BudgetError) as caught:
        dynaexq.patch(model, 1)
    size = caught.value.least // 1000
    with refused(model, BudgetError, "too small"):
        dynaexq.patch(model, f"{size}KB")
    assert dynaexq.patch(model, f"{size}KiB").plan.budget == size * 1024


def test_a_second_patch_is_refused_and_the_first_stays() -> None:
    model = tiny.tiny_qwen3_moe()
    rt = dynaexq.patch(model, AMPLE, tiers=("int2", "int4"))
    with refused(
        model, PatchError, r"model.layers.0.mlp.experts is patched already; use model.dynaexq, or dynaexq.unp"
    ):
        dynaexq.patch(model, AMPLE)
    assert model.dynaexq is rt


@pytest.mark.parametrize("thing", ["Qwen/Qwen3-30B-A3B", None, {}], ids=repr)
def test_what_is_not_a_module_is_refused(thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"expected a torch.nn.Module .* got {type(thing).__name__}"):
        dynaexq.patch(thing, AMPLE)


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class of the same name."""


class ParamWrapper(nn.Module):
    """Stands for an adapter round the experts, as PEFT puts it there."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any) -> torch.Tensor:
        return self.base_layer(*args)


def dense_llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


def changed(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """A tiny model whose second layer of experts went through `change`."""

    def build() -> nn.Module:
        model = tiny.tiny_qwen3_moe()
        change(tiny.sparse_blocks(model)[1].experts)
        return model

    return build


def four_bit(experts: nn.Module) -> None:
    experts.down_proj = Params4bit(experts.down_proj.detach().to(torch.uint8), requires_grad=False)


def eight_bit_floats(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)


def float32_inside(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.detach().float())


def parametrized(experts: nn.Module) -> None:
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())


def own_forward(experts: nn.Module) -> None:
    forward = experts.forward
    experts.forward = lambda *args: forward(*args)


def with_weight(name: str, value: float) -> Callable[[nn.Module], None]:
    def change(experts: nn.Module) -> None:
        with torch.no_grad():
            getattr(experts, name)[3, 1, 2] = value

    return change


def adapted() -> nn.Module:
    model = tiny.tiny_qwen3_moe()
    for block in tiny.sparse_blocks(model):
        block.experts = ParamWrapper(ParamWrapper(block.experts))
    return model


def fewer_experts_in_the_second_layer() -> nn.Module:
    model = tiny.tiny_qwen3_moe()
    model.model.layers[1] = tiny.tiny_qwen3_moe(num_experts=4).model.layers[1]
    return model


def compiled_in_place() -> nn.Module:
    model = tiny.tiny_qwen3_moe()
    model.compile()
    return model


SECOND = "model.layers.1.mlp.experts"
MODELS: dict[str, tuple[Callable[[], nn.Module], type[DynaExqError], str]] = {
    "without experts": (
        dense_llama,
        UnsupportedModelError,
        "LlamaForCausalLM, found none; dense models need no dynaexq",
    ),
    "in 4 bits": (changed(four_bit), UnsupportedModelError, f"{SECOND}.down_proj is a Params4bit, .* unquantized"),
    "in 8-bit floats": (
        changed(eight_bit_floats),
        UnsupportedModelError,
        f"{SECOND}.down_proj is torch.float8_e4m3fn",
    ),
    "on meta": (changed(lambda e: e.to("meta")), UnsupportedModelError, f"{SECOND}.down_proj is on the meta device"),
    "dtype of a layer": (
        changed(nn.Module.float),
        UnsupportedModelError,
        rf"one dtype in all layers, .*bfloat16 .*float32 in {SECOND}",
    ),
    "dtype of a matrix": (
        changed(float32_inside),
        UnsupportedModelError,
        f"{SECOND}: expected one dtype .*float32 .*bfloat16",
    ),
    "number of experts": (fewer_experts_in_the_second_layer, UnsupportedModelError, "number of experts .* 8 .* 4 in"),
    "parametrized": (changed(parametrized), UnsupportedModelError, f"{SECOND} is parametrized"),
    "own forward": (changed(own_forward), UnsupportedModelError, f"{SECOND} has a forward of its own"),
    "adapter": (adapted, UnsupportedModelError, "layers.0.mlp.experts.* wrapped by an adapter"),
    "compiled": (lambda: torch.compile(tiny.tiny_qwen3_moe()), PatchError, "compiled already; patch first"),
    "compiled in place": (compiled_in_place, PatchError, "the model is compiled already; patch first"),
    "DataParallel": (lambda: DataParallel(tiny.tiny_qwen3_moe()), UnsupportedModelError, "patch model.module before"),
}
CANNOT_RUN = {"in 4 bits", "in 8-bit floats", "on meta", "dtype of a layer", "dtype of a matrix"}
DO_NOT_RUN = {"compiled", "compiled in place", "DataParallel"}  # would compile for long, or has no generate


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_patched_is_refused(case: str) -> None:
    build, error, match = MODELS[case]
    model = build()
    with refused(model, error, match, runs=case not in CANNOT_RUN | DO_NOT_RUN):
        dynaexq.patch(model, AMPLE)


def test_a_distributed_model_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny.tiny_qwen3_moe())
        with refused(model, UnsupportedModelError, "DistributedDataParallel wraps the model", runs=False):
            dynaexq.patch(model, AMPLE)
    finally:
        torch.distributed.destroy_process_group()


WEIGHTS = {
    "NaN": ("down_proj", math.nan, "second matrix, expert 3: .* found nan"),
    "infinity": ("gate_up_proj", -math.inf, "first matrix, expert 3: .* found inf"),
    "a giant": ("gate_up_proj", 65536.0, "first matrix, expert 3: .* found 65536"),
}


@pytest.mark.parametrize(("name", "value", "match"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("tiers", [("int4",), ("int2", "int8"), ("int4", "fp16")], ids="-".join)
def test_a_weight_without_a_code_is_named(name: str, value: float, match: str, tiers: tuple[str, ...]) -> None:
    model = changed(with_weight(name, value))()
    with refused(model, QuantizationError, f"{SECOND}, {match}"):
        patching.patch(model, AMPLE, tiers=tiers, quantizer="rtn")


@pytest.mark.parametrize(("name", "value", "match"), WEIGHTS.values(), ids=WEIGHTS)
def test_the_dtype_of_the_model_represents_any_weight(name: str, value: float, match: str) -> None:
    model = changed(with_weight(name, value))()
    before = tiny.logits(model)
    dynaexq.patch(model, AMPLE, tiers=("fp16",))
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=0, equal_nan=True)


NATIVE = load(True) is not None  # then norms are changed as well

STEPS = {  # what patch goes through, and how often at least for two layers
    "encode": (ExpertCodec, "encode", 2),
    "write": (RamStore, "write", 2),
    "swap_class": (dynaexq.hf.model_patch, "swap_class", 6 if NATIVE else 4),
    "connect": (MixedPrecisionExperts, "connect", 2),
    "show": (DeviceRuntime, "view", 2),
    "guard": (dynaexq.hf.model_patch.ModelPatch, "_guard_ancestors", 1),
    "attach": (dynaexq.hf.patcher, "DynaExqQuantizer", 1),
}
FAILURES = [
    (step, call, error) for step in STEPS for call in range(STEPS[step][2]) for error in (OSError, KeyboardInterrupt)
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("step", "call", "error"), FAILURES, ids=[f"{s}-{c}-{e.__name__}" for s, c, e in FAILURES])
def test_a_failure_half_way_leaves_the_model_as_it_was(
    step: str, call: int, error: type[BaseException], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, _ = STEPS[step]
    original, calls = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 == call and when == "before":
            raise error("by the test")
        result = original(*args, **kwargs)
        if calls - 1 == call:
            raise error("by the test")
        return result

    model = tiny.tiny_qwen3_moe()
    answer, before = tiny.generated(model), tiny.anatomy(model)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(error, match="by the test"):
            patching.patch(model, AMPLE, tiers=("int2", "int4"), quantizer="rtn")
    assert tiny.anatomy(model) == before
    assert tiny.generated(model) == answer

    with monkeypatch.context() as patched:
        calls = far = -(10**6)  # none of the calls of one patch is to fail
        patched.setattr(owner, name, failing)
        rt = patching.patch(model, AMPLE, tiers=("int2", "int4"), quantizer="rtn")
    assert calls > far, "the step was not on the way"
    assert (rt.tiers() == 4).all()
    tiny.generated(model)


def test_a_failure_half_way_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("by the test")

    monkeypatch.setattr(MixedPrecisionExperts, "connect", fail)
    model = tiny.tiny_qwen3_moe()
    with pytest.raises(OSError, match="by the test"):
        dynaexq.patch(model, AMPLE)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is dynaexq.Runtime and thing._model() is model]
