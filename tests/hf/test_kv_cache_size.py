"""The cache's size, found on the meta device, against the bytes that a real model's cache takes."""

from collections.abc import Iterator
from typing import Any

import models
import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from dynaexq.hf import kv_cache_size, planning
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.hf.kv_cache_size import cache_bytes
from dynaexq.hf.meta_model import meta_twin
from dynaexq.settings import Settings

BATCH = 2

# Family, what it needs besides, and whose cache is unlike its neighbor's.
KINDS = {
    "keys and values": ("mixtral", {}),
    "few heads": ("minimax_m2", {"num_key_value_heads": 1}),
    "latent": ("deepseek_v3", {}),
    "index beside a latent": ("deepseek_v32", {}),
    "short window": ("gpt_oss", {"sliding_window": 20}),
    "window between the trials": ("gpt_oss", {"sliding_window": 200}),
    "window beyond the trials": ("gpt_oss", {"sliding_window": 300}),
    "chunks": ("deepseek_v4", {}),
    "gated delta rule": ("qwen3_next", {}),
    "state space": ("granitemoehybrid", {}),
    "convolution": ("lfm2_moe", {}),
    "lightning": ("minimax", {}),
    "state and keys in one layer": ("zaya", {}),
    "layers without attention": ("nemotron_h", {}),
}
kinds = pytest.mark.parametrize(("family", "overrides"), KINDS.values(), ids=KINDS)


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """Tensors of a cache, its layers, and the lists and dicts they keep; not the counters of a window."""
    if isinstance(thing, torch.Tensor):
        yield from [thing] if thing.ndim else []
    elif isinstance(thing, dict | list | tuple):
        for child in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_in(child)
    elif "Cache" in type(thing).__name__ or type(thing).__name__.endswith("Layer"):
        yield from tensors_in(vars(thing))


def real_bytes(model: PreTrainedModel, tokens: int) -> int:
    with torch.no_grad():
        output = model(models.tokens(BATCH, tokens), use_cache=True)
    return sum(tensor.nbytes for tensor in tensors_in(output["cache" if "cache" in output else "past_key_values"]))


def predicted_bytes(model: PreTrainedModel, tokens: int) -> int:
    meta_model = meta_twin(model)
    return cache_bytes(meta_model, find_sparse_layers(meta_model, on_meta=True), tokens, BATCH)


@kinds
def test_the_trial_tells_what_the_real_cache_takes(family: str, overrides: dict[str, Any]) -> None:
    if not models.is_known(family):
        pytest.skip(f"this Transformers has no {family} with the experts interface")
    model = models.tiny_model(family, **overrides)
    counters = 8 * model.config.num_hidden_layers  # of the layers with a window
    for tokens in (256, 640):
        assert 0 <= predicted_bytes(model, tokens) - real_bytes(model, tokens) <= counters


def test_the_skeleton_is_as_it_was() -> None:
    meta_model = meta_twin(tiny.tiny_qwen3_moe())
    before = tiny.anatomy(meta_model)
    cache_bytes(meta_model, find_sparse_layers(meta_model, on_meta=True), 300, 1)
    assert tiny.anatomy(meta_model) == before
    find_sparse_layers(meta_model, on_meta=True)


@pytest.mark.parametrize("build", [tiny.tiny_qwen3_moe, tiny.tiny_qwen3_next], ids=["qwen3_moe", "qwen3_next"])
def test_a_model_that_cannot_do_without_data_is_counted_in_full(
    build: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    meta_model = meta_twin(model)
    layers = find_sparse_layers(meta_model, on_meta=True)
    expected = kv_cache_size.context_bytes(meta_model, layers, 300, BATCH)

    def needs_data(*args: Any) -> int:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(kv_cache_size, "cache_bytes", needs_data)
    fallback = kv_cache_size.context_bytes(meta_model, layers, 300, BATCH)
    assert "cannot be called on meta tensors" in caplog.text
    assert fallback.activations == expected.activations
    growing = sum(kind == "full_attention" for kind in getattr(model.config, "layer_types", ["full_attention"] * 2))
    assert fallback.cache == growing * 2 * 1 * 32 * 300 * BATCH * 2
    if growing == 2:
        assert fallback.cache == expected.cache


def test_a_module_that_is_none_of_transformers_has_no_context() -> None:
    assert sum(planning.context_for(nn.Linear(2, 2), Settings())) == 0
