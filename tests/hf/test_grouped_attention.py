"""Attention of one new token over grouped heads: the same numbers, whatever the mask, and nothing else is changed."""

from typing import Any

import patching
import pytest
import tiny
import torch
from models import tiny_model
from numerics import assert_close
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dynaexq
from dynaexq.hf import grouped_attention as attention

BATCH, HEADS, GROUPS, LENGTH, SIZE = 3, 8, 2, 11, 16


def inputs(query_length: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    query = torch.randn(BATCH, HEADS, query_length, SIZE)
    key, value = torch.randn(2, BATCH, GROUPS, LENGTH, SIZE)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def module() -> nn.Module:
    found = nn.Module()
    found.num_key_value_groups = HEADS // GROUPS
    found.is_causal = True
    return found


def mask_of(kind: str) -> Tensor | None:
    allowed = torch.rand(BATCH, 1, 1, LENGTH) < 0.6
    allowed[..., 0] = True
    if kind == "none":
        return None
    if kind == "of every head":
        return torch.randn(BATCH, HEADS, 1, LENGTH)
    return allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "of every head"])
@pytest.mark.parametrize("query_length", [1, 4])
def test_the_output_is_that_of_transformers(query_length: int, kind: str, scaling: float | None) -> None:
    arguments = (module(), *inputs(query_length), mask_of(kind))
    expected, _ = sdpa_attention_forward(*arguments, scaling=scaling)
    output, weights = attention.grouped_attention(*arguments, scaling=scaling)
    assert weights is None
    assert_close(kind, expected, output, 1e-6)


def test_one_token_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("left to Transformers")

    monkeypatch.setattr(attention, "sdpa_attention_forward", unexpected)
    attention.grouped_attention(module(), *inputs(), mask_of("bool"))
    with pytest.raises(AssertionError, match="left to Transformers"):
        attention.grouped_attention(module(), *inputs(), mask_of("of every head"))
    with pytest.raises(AssertionError, match="left to Transformers"):
        attention.grouped_attention(module(), *inputs(), None, position_bias=torch.zeros(BATCH, HEADS, 1, LENGTH))


def test_a_patched_model_decodes_with_it_and_is_given_back_as_it_was() -> None:
    model = tiny_model("qwen3_moe", num_key_value_heads=1)
    expected = tiny.generated(model)
    patching.patch(model, tiers=("int8", "fp16"), hbm_budget="1GiB")
    assert model.config._attn_implementation == attention.NAME
    assert attention.NAME not in model.config.to_json_string()
    assert len(tiny.generated(model)[0]) == len(expected[0])
    dynaexq.unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert tiny.generated(model) == expected


@torch.no_grad()
def test_padded_rows_and_the_whole_text_at_once_give_the_logits_of_one_token_at_a_time() -> None:
    model = tiny_model("qwen3_moe", num_key_value_heads=1)
    patching.patch(model, tiers=("int8",), hbm_budget="1GiB")
    ids = tiny.prompt(batch=2, length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = model(ids, attention_mask=mask).logits
    cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    for position in range(6, 9):
        step = model(ids[:, position, None], attention_mask=mask[:, : position + 1], past_key_values=cache)
        assert_close(f"{position}", whole[:, position], step.logits[:, 0], 1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_decoding_repeats_nothing_and_goes_on_ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe", num_key_value_heads=1)
    patching.patch(model, tiers=("int2", "int8"), hbm_budget="1GiB", update_interval=1)
    model.dynaexq.freeze()
    common = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tiny.prompt(), **common)
    compiling = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    lengths: list[int] = []

    def noted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", noted)
    before = model.dynaexq.stats()
    assert torch.equal(model.generate(tiny.prompt(), **common, compile_config=compiling), expected)
    assert model._compiled_call is not None
    assert set(lengths) == {tiny.prompt().shape[1]}, "only the prompt went the other way"
    assert model.dynaexq.stats()["ticks"] == before["ticks"] + 6


def test_what_is_exact_and_what_is_eager_stays_as_it_is() -> None:
    exact = tiny.tiny_qwen3_moe()
    patching.patch(exact, tiers=("fp16",), hbm_budget="1GiB")
    assert exact.config._attn_implementation == "sdpa"
    eager = tiny.tiny_qwen3_moe()
    eager.set_attn_implementation("eager")
    patching.patch(eager, tiers=("int4",), hbm_budget="1GiB")
    assert eager.config._attn_implementation == "eager"
