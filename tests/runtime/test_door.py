"""Padding is no traffic: a padded batch leaves the hotness, the counts and the ticks that its rows leave alone."""

from typing import Any

import numpy as np
import patching
import pytest
import tiny
import torch
from torch import Tensor, nn

import dynaexq
from dynaexq.runtime.door import _GIVEN, _NOTHING, _Given, tokens_among

SIZES = (16, 5, 3)


def patched() -> nn.Module:
    model = tiny.tiny_qwen3_moe(torch.float32)
    patching.patch(model, "1GiB", tiers=("int4", "int8"), update_interval=1, half_life=64)
    return model


def rows(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (size,), generator=draw) for size in SIZES]


def padded(sequences: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask `[batch, longest]`."""
    ids, mask = torch.zeros(len(SIZES), max(SIZES), dtype=torch.long), torch.zeros(len(SIZES), max(SIZES))
    for i, row in enumerate(sequences):
        place = slice(-len(row), None) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask.long()


def by_keyword(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(input_ids=ids, attention_mask=mask)


def by_position(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(ids, mask)


def by_embeddings(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)


def by_boolean_mask(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(ids, attention_mask=mask.bool())


DOORS = (by_keyword, by_position, by_embeddings, by_boolean_mask)


@torch.no_grad()
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("left", [True, False])
def test_a_padded_batch_counts_as_its_rows_do(door: Any, left: bool) -> None:
    """The same tokens see the same experts, up to the rounding of attention under a mask."""
    alone, batch = patched(), patched()
    for row in rows():
        alone(row[None])
    door(batch, *padded(rows(), left))
    for model in (alone, batch):
        model.dynaexq.tick()
    assert batch.dynaexq.stats()["tokens"] == alone.dynaexq.stats()["tokens"] == sum(SIZES)
    np.testing.assert_allclose(batch.dynaexq.routed_mass(), alone.dynaexq.routed_mass(), rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_generating_from_a_padded_batch_counts_prompts_and_what_is_new() -> None:
    model = patched()
    ids, mask = padded(rows(), left=True)
    model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    model.dynaexq.tick()
    assert model.dynaexq.stats()["tokens"] == sum(SIZES) + 4 * len(SIZES)


@torch.no_grad()
def test_the_mask_of_one_forward_is_forgotten_with_it() -> None:
    model = patched()
    ids, mask = padded(rows(), left=True)
    model(ids, attention_mask=mask)
    model(ids)
    with pytest.raises(AttributeError):
        model(ids, attention_mask=mask, past_key_values="none")
    model.model(ids)
    model.dynaexq.tick()
    assert model.dynaexq.stats()["tokens"] >= sum(SIZES) + 2 * ids.numel()


def test_the_mask_comes_to_the_device_of_the_layer() -> None:
    """Layers of one model may lie on several devices."""
    _GIVEN.set(_Given(torch.tensor([True, False])))
    try:
        assert tokens_among(torch.empty(2, 4, device="meta")).device.type == "meta"
        assert tokens_among(torch.empty(3, 4)) is None
    finally:
        _GIVEN.set(_NOTHING)


@torch.no_grad()
def test_an_unpatched_model_has_no_hooks_left() -> None:
    model = tiny.tiny_qwen3_moe()
    before = len(model._forward_pre_hooks), len(model._forward_hooks)
    dynaexq.patch(model, "1GiB", tiers=("fp16",))
    dynaexq.unpatch(model)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before
