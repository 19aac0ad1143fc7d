"""`generate` with a static cache replays a graph of the forward: the same answers, or the compiler where none can be.

The graphs are played on a CPU (`played_graph`); `tests/gpu/test_graphs.py` has real ones.
"""

from collections.abc import Callable, Iterator
from typing import Any

import patching
import played_graph
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationMixin, MixtralConfig, MixtralForCausalLM, StaticCache

from dynaexq.hf import captured_decode

NEW_TOKENS = 8
STATIC = {"cache_implementation": "static", "max_new_tokens": NEW_TOKENS, "do_sample": False}


@pytest.fixture(autouse=True)
def _a_gpu_played_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(captured_decode, "on_one_gpu", lambda model: True)
    monkeypatch.setattr(captured_decode, "record", played_graph.record)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", _on_a_gpu)
    played_graph.captures.clear()
    yield
    played_graph.captures.clear()


def _on_a_gpu(model: Any, arguments: dict[str, Any], generation_config: Any) -> bool:
    return generation_config.cache_implementation == "static" and not generation_config.disable_compile


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of Transformers' compiler, which here compiles nothing."""
    asked: list[Any] = []

    def compiler(patch: Any, name: str, compile_config: Any) -> Callable[..., Any]:
        asked.append(compile_config)
        return patch.model.__call__  # type: ignore[no-any-return]

    monkeypatch.setattr(captured_decode, "by_transformers", compiler)
    return asked


def model_of(family: Callable[..., Any] = tiny.tiny_qwen3_moe) -> Any:
    model = family(torch.float32)
    patching.patch(model, "1GiB", tiers=("int4", "int8"), quantizer="rtn", policy="frozen", device="cpu")
    return model


def mixtral_with_a_window(dtype: torch.dtype) -> nn.Module:
    sizes = {name: value for name, value in tiny.SIZES.items() if name in MixtralConfig().to_dict()}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, sliding_window=14)).to(dtype).eval()


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones_like(tiny.prompt())
    mask[1, :5] = 0
    return {"input_ids": tiny.prompt(), "attention_mask": mask}


@pytest.mark.parametrize("family", [tiny.tiny_qwen3_moe, tiny.tiny_qwen3_next])
@pytest.mark.parametrize("given", [{"input_ids": tiny.prompt()}, left_padded()], ids=["whole", "padded"])
def test_replays_write_what_forwards_write(family: Any, given: Any, compiled: list[Any]) -> None:
    model = model_of(family)
    answer = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    eager = model.generate(**given, **STATIC, **answer, disable_compile=True)
    assert not played_graph.captures
    replayed = model.generate(**given, **STATIC, **answer)
    assert len(played_graph.captures) == 1, "one graph for all tokens but the first two"
    assert replayed.sequences.tolist() == eager.sequences.tolist()
    for ours, theirs in zip(replayed.logits, eager.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(replayed.hidden_states[-1], eager.hidden_states[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not compiled


def test_what_an_earlier_token_was_given_is_not_overwritten() -> None:
    model = model_of()
    answer = model.generate(tiny.prompt(), **STATIC, return_dict_in_generate=True, output_hidden_states=True)
    last_layers = [states[-1] for states in answer.hidden_states[1:]]
    assert not any(torch.equal(a, b) for a, b in zip(last_layers[1:], last_layers[:-1], strict=True))


def test_every_call_captures_anew_and_finds_new_weights() -> None:
    model = model_of()
    first = model.generate(tiny.prompt(), **STATIC)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    changed = model.generate(tiny.prompt(), **STATIC)
    assert len(played_graph.captures) == 2
    assert changed.tolist() != first.tolist()
    assert changed.tolist() == model.generate(tiny.prompt(), **STATIC, disable_compile=True).tolist()


def test_a_compiler_that_is_asked_for_is_given(compiled: list[Any]) -> None:
    wanted = CompileConfig(mode="default")
    model_of().generate(tiny.prompt(), **STATIC, compile_config=wanted)
    assert compiled == [wanted]
    assert not played_graph.captures


def test_hooks_of_others_are_called_for_every_token(compiled: list[Any]) -> None:
    model, seen = model_of(), []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(tiny.prompt(), **STATIC)
    assert len(seen) == NEW_TOKENS
    assert compiled == [None]


def test_a_cache_that_counts_in_python_is_left_to_the_compiler(
    compiled: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(mixtral_with_a_window)
    expected = model.generate(tiny.prompt(), **STATIC, disable_compile=True)
    assert model.generate(tiny.prompt(), **STATIC).tolist() == expected.tolist()
    assert compiled == [None]
    assert "decoding is compiled from now on" in caplog.text


def test_what_cannot_be_captured_is_left_to_the_compiler(
    compiled: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(work: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(captured_decode, "record", record)
    model = model_of()
    expected = model.generate(tiny.prompt(), **STATIC, disable_compile=True)
    assert model.generate(tiny.prompt(), **STATIC).tolist() == expected.tolist()
    assert compiled == [None]
    assert "because operation not permitted when stream is capturing\n" in caplog.text


@torch.no_grad()
def test_a_cache_whose_tensors_are_replaced_is_left_to_the_compiler(compiled: list[Any]) -> None:
    model, ids = model_of(), tiny.prompt()

    def written(forward: Callable[..., Any]) -> Tensor:
        found, cache = [], StaticCache(config=model.config, max_cache_len=32)
        model(ids, past_key_values=cache)
        for position in range(4):
            if position == 3:
                cache.layers[0].keys = cache.layers[0].keys.clone()
            found.append(forward(input_ids=ids[:, position : position + 1], past_key_values=cache).logits)
        return torch.cat(found)

    torch.testing.assert_close(written(model.get_compiled_call(None)), written(model), rtol=1e-5, atol=1e-5)
    assert len(played_graph.captures) == 1
    assert compiled == [None]


def test_chunks_of_a_prompt_are_not_captured(compiled: list[Any]) -> None:
    model, ids = model_of(), tiny.prompt(length=80)
    expected = model.generate(ids, **STATIC, disable_compile=True)
    assert model.generate(ids, **STATIC, prefill_chunk_size=20).tolist() == expected.tolist()
    assert len(played_graph.captures) == 1
    assert not compiled


def test_calls_of_different_shapes_share_no_graph() -> None:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    one = {"input_ids": ids, "use_cache": True}
    same = {"input_ids": ids + 1, "use_cache": True}
    assert captured_decode.shape_of(one) == captured_decode.shape_of(same)
    for other in (
        {"input_ids": ids[:1], "use_cache": True},
        {"input_ids": ids.int(), "use_cache": True},
        {"input_ids": ids, "use_cache": False},
        {"input_ids": ids, "use_cache": 1},
        {"input_ids": ids, "use_cache": True, "attention_mask": None},
    ):
        assert captured_decode.shape_of(one) != captured_decode.shape_of(other)
    assert captured_decode.shape_of(one | {"cache": object()}) is None, "no cache of Transformers"
    assert captured_decode.shape_of(one | {"more": object()}) is None
    assert captured_decode.shape_of({"input_ids": torch.zeros(1, 17)}) is None, "a prompt"
