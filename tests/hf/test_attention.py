"""Few queries of a patched model attend natively, in every way to generate; all else is PyTorch's, bit for bit."""

from functools import partial
from typing import Any

import patching
import pytest
import tiny
import torch
from models import FAMILIES, is_known, tiny_model, tokens
from numerics import assert_close
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, StaticCache

import dynaexq
from dynaexq.hf.decode_attention import NATIVE, SdpaOfFew
from dynaexq.kernels.cpu.build import load
from dynaexq.kernels.cpu.native_decoder import NativeAttention

ROUNDINGS = 2**-5  # of some dozen operators in bfloat16

pytestmark = pytest.mark.skipif(load(True) is None, reason="needs the native kernel")


class Calls(list[tuple[int, int]]):
    """Queries and keys of every native call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        native = NativeAttention.__call__

        def counted(attention: NativeAttention, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
            self.append((query.shape[2], key.shape[2]))
            return native(attention, query, key, *rest)

        monkeypatch.setattr(NativeAttention, "__call__", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def patched(**options: Any) -> PreTrainedModel:
    model = tiny.tiny_qwen3_moe(num_attention_heads=4)
    patching.patch(model, "1GiB", tiers=("int8", "fp16"), device="cpu", **options)
    return model


steps = partial(tiny.steps, first=12, last=20)

PADDED = torch.ones(2, 20, dtype=torch.int64)
PADDED[0, :5] = 0
CASES = {
    "a token at a time": {},
    "four at a time": {"count": 4},
    "left padding": {"mask": PADDED},
    "left padding, four at a time": {"mask": PADDED, "count": 4},
}


@pytest.mark.parametrize("static", [False, True], ids=["a cache that grows", "a static cache"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_follows_a_prompt_attends_natively(case, static, calls, monkeypatch):
    model = patched()

    def run() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32) if static else None
        return steps(model, cache=cache, **case)[PADDED > 0 if "mask" in case else slice(None)]

    got = run()
    per_call = case.get("count", 1)
    assert [queries for queries, _ in calls if queries != 12] == 8 // per_call * 2 * [per_call]
    monkeypatch.setattr(NativeAttention, "takes", lambda *_: False)
    assert_close("logits", run(), got, ROUNDINGS)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beam search": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_generate_takes_it(way, calls):
    model = patched()
    rows = 1 if "prompt_lookup_num_tokens" in way else 2
    model.generate(tiny.prompt(rows), max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **way)
    assert any(keys > 12 for _, keys in calls)


@pytest.mark.parametrize("change", ["gradients", "training", "compiled", "eager", "float32"])
def test_what_pytorch_must_see_it_computes(change, calls):
    model = patched() if change != "float32" else tiny.tiny_qwen3_moe(torch.float32)
    row = tiny.prompt(length=1)
    if change == "float32":
        patching.patch(model, "1GiB", tiers=("int8", "fp16"), device="cpu")
    if change == "eager":
        model.set_attn_implementation("eager")
    if change == "training":
        model.train()
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    if change == "gradients":
        model(row).logits.sum().backward()
    else:
        with torch.no_grad():
            (torch.compile(model, backend="eager") if change == "compiled" else model)(row)
    assert not calls


def test_other_models_keep_their_bits_and_a_model_gets_its_own_back(calls):
    plain = tiny.tiny_qwen3_moe(num_attention_heads=4)
    before = steps(plain)
    model = patched()
    assert isinstance(AttentionInterface()["sdpa"], SdpaOfFew)
    assert not isinstance(AttentionInterface()["sdpa"].original, SdpaOfFew), "wrapped once"
    assert torch.equal(steps(plain), before)
    assert not calls
    steps(model)
    assert calls
    dynaexq.unpatch(model)
    assert not any(NATIVE in vars(module) for module in model.modules())
    calls.clear()
    assert torch.equal(steps(model), before)
    assert not calls


def test_exact_models_have_pytorchs(calls):
    model = tiny.tiny_qwen3_moe()
    before = steps(model)
    patching.patch(model, "1GiB", tiers=("fp16",), device="cpu")
    assert torch.equal(steps(model), before)
    assert not calls


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_attend_are_found(family, monkeypatch):
    if not is_known(family):
        pytest.skip("this version of Transformers does not know it")
    model, asked = tiny_model(family), []
    if model.config._attn_implementation != "sdpa":
        pytest.skip("it does not attend through sdpa")
    patching.patch(model, "1GiB", tiers=("int8", "fp16"), device="cpu")
    attend = SdpaOfFew.__call__

    def watched(sdpa: SdpaOfFew, module: torch.nn.Module, *rest: Any, **others: Any) -> Any:
        asked.append(NATIVE in vars(module))
        return attend(sdpa, module, *rest, **others)

    monkeypatch.setattr(SdpaOfFew, "__call__", watched)
    with torch.no_grad():
        model(tokens())
    assert asked
    assert all(asked)
