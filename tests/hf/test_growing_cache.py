"""A cache with room at its end: what Transformers' own has, bit for bit, whatever is done to it between two steps."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import patching
import pytest
import tiny
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

import dynaexq
from dynaexq.hf import growing_cache
from dynaexq.hf.growing_cache import RoomyLayer, watch_caches
from dynaexq.runtime.cache_room import STRIDES


def roomy() -> RoomyLayer:
    layer = DynamicLayer()
    layer.__class__, layer._given = RoomyLayer, {}
    return layer


def joining(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, tokens, 8), torch.randn(batch, 3, tokens, 6)


def same(layer: DynamicLayer, other: DynamicLayer) -> bool:
    return torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every tensor that was copied to get room."""
    found, with_room = [], growing_cache._with_room

    def counted(old: Tensor, tokens: int) -> Tensor:
        found.append(old.shape[-2])
        return with_room(old, tokens)

    monkeypatch.setattr(growing_cache, "_with_room", counted)
    return found


@torch.no_grad()
def test_tokens_join_in_place(moves: list[int]) -> None:
    layer, plain = roomy(), DynamicLayer()
    for tokens in (30, *[1] * 300, 20, *[1] * 10):
        arrived = joining(tokens)
        given = layer.update(*arrived)
        plain.update(*arrived)
        assert given[0] is layer.keys
        assert given[1] is layer.values
        assert same(layer, plain)
        assert layer.get_seq_length() == plain.get_seq_length()
    assert moves == [31, 31, 160, 160, 289, 289]
    assert STRIDES[0] == 128, "what the line above was worked out with"
    assert layer.keys.untyped_storage().nbytes() <= 4 * 2 * 3 * 8 * (360 + 128)


@torch.no_grad()
def test_what_does_not_fit_is_left_to_pytorch() -> None:
    layer, plain = roomy(), DynamicLayer()
    for arrived in (joining(5), joining(1), joining(1), [tensor.double() for tensor in joining(1)], joining(1)):
        layer.update(*arrived)
        plain.update(*arrived)
        assert same(layer, plain)
        assert layer.keys.dtype == plain.keys.dtype
    for other in (joining(1, batch=1), [tensor[..., :1] for tensor in joining(1)]):
        with pytest.raises(RuntimeError):
            layer.update(*other)
        assert same(layer, plain)


def replaced(layer: DynamicLayer) -> None:
    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


CHANGES: dict[str, Callable[[DynamicLayer], None]] = {
    "cropped": lambda layer: layer.crop(-2),
    "in another order": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "selected": lambda layer: layer.batch_select_indices(torch.tensor([0, 1])),
    "replaced": replaced,
    "one of the two replaced": lambda layer: setattr(layer, "keys", layer.keys.clone()),
    "reset": lambda layer: layer.reset(),
    "cast": lambda layer: setattr(layer, "keys", layer.keys.double().float()),
    "changed in place": lambda layer: layer.keys.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_whatever_others_do_to_it_is_followed(change: Callable[[DynamicLayer], None]) -> None:
    layer, plain = roomy(), DynamicLayer()
    for tokens in (9, 1, 1, 1, 0, 4, 1, 0, 1, 1, 1, 0, 1):
        if not tokens:
            change(layer)
            change(plain)
            continue
        arrived = joining(tokens)
        layer.update(*arrived)
        plain.update(*arrived)
        assert same(layer, plain)


@torch.no_grad()
def test_what_was_given_out_before_stays_as_it_was() -> None:
    layer, given = roomy(), []
    for tokens in (5, *[1] * 20):
        layer.update(*joining(tokens))
        given.append((layer.keys, layer.keys.clone()))
        if len(given) in (8, 15):
            layer.crop(-3)  # a prefix that is taken up again, as assisted decoding does
    assert all(torch.equal(tensor, kept) for tensor, kept in given)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_copies_are_plain_and_neither_writes_into_the_other(copied: Callable[[Any], Any]) -> None:
    layer, plain = roomy(), DynamicLayer()
    for tokens in (5, 1, 1, 1):
        arrived = joining(tokens)
        layer.update(*arrived)
        plain.update(*arrived)
    twin, other = copied(layer), copied(plain)
    assert type(twin) is DynamicLayer
    twin.__class__, twin._given = RoomyLayer, {}  # as at the door
    for _ in range(4):
        one, two = joining(1), joining(1)
        layer.update(*one)
        plain.update(*one)
        twin.update(*two)
        other.update(*two)
    assert same(layer, plain)
    assert same(twin, other)


@torch.no_grad()
def test_nothing_is_kept_that_a_layer_has_lost() -> None:
    layer = roomy()
    for tokens in (5, 1, 1, 1):
        layer.update(*joining(tokens))
    seen = torch.multiprocessing.reductions.StorageWeakRef(layer.keys.untyped_storage())
    layer.reorder_cache(torch.tensor([1, 0]))
    assert seen.expired()
    assert layer.tokens_free == 0


def test_gradients_go_through_the_cache() -> None:
    layer, plain = roomy(), DynamicLayer()
    arrived = [[t.requires_grad_() for t in joining(tokens)] for tokens in (5, 1, 1, 1)]
    for tensors in arrived:
        layer.update(*tensors)
        plain.update(*tensors)
    found = torch.autograd.grad(layer.keys.square().sum(), [keys for keys, _ in arrived])
    expected = torch.autograd.grad(plain.keys.square().sum(), [keys for keys, _ in arrived])
    assert all(map(torch.equal, found, expected))


def test_inference_mode_may_come_and_go() -> None:
    layer, plain = roomy(), DynamicLayer()
    for step in range(12):
        with torch.inference_mode(step // 3 % 2 == 0), torch.no_grad():
            arrived = joining(1)
            layer.update(*arrived)
            plain.update(*arrived)
            assert same(layer, plain)


@torch.no_grad()
def test_a_patched_model_gives_room_to_plain_layers_alone_until_it_is_unpatched(moves: list[int]) -> None:
    model = tiny.tiny_qwen3_moe()
    patching.patch(model, "1GiB", tiers=("int8", "fp16"), device="cpu")
    cache = DynamicCache(config=model.config)
    for _ in range(4):
        model(tiny.prompt(length=3), past_key_values=cache)
    assert {type(layer) for layer in cache.layers} == {RoomyLayer}
    assert len(moves) == 2 * len(cache.layers)
    model.generate(tiny.prompt(), max_new_tokens=8, cache_implementation="static", pad_token_id=0)
    dynaexq.unpatch(model)
    fresh = DynamicCache(config=model.config)
    model(tiny.prompt(), past_key_values=fresh)
    assert {type(layer) for layer in fresh.layers} == {DynamicLayer}
    before = model(tiny.prompt(), past_key_values=cache).logits  # which is still of use
    assert before.isfinite().all()


def test_the_watch_ends() -> None:
    model = torch.nn.Linear(1, 1)
    watch_caches(model)()
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_a_caller_may_write_what_joins_where_there_is_room() -> None:
    layer, plain = roomy(), DynamicLayer()
    extended = 0
    for tokens in (30, *[1] * 140, 3, *[2] * 10):
        arrived = joining(tokens)
        before = None if layer.keys is None else layer.keys
        seen = None if before is None else before.clone()
        longer = layer.extended(tokens) if before is not None else None
        if longer is None:
            layer.update(*arrived)
        else:
            extended += 1
            for memory, new in zip(longer, arrived, strict=True):
                memory[..., -tokens:, :] = new
            assert longer[0] is layer.keys
        plain.update(*arrived)
        assert same(layer, plain)
        assert before is None or torch.equal(before, seen), "who holds what was given out sees no change"
    assert extended == 148, "all but the first to come, two that make room, and one when it is full"


@torch.no_grad()
def test_nobody_writes_where_there_is_no_room_or_what_others_may_hold() -> None:
    layer = roomy()
    for tokens in (5, 1, 1, 1):
        layer.update(*joining(tokens))
    assert layer.extended(layer.tokens_free + 1) is None
    layer.crop(-1)
    assert layer.extended(1) is None, "what was cropped may be held by others"
    with torch.enable_grad():
        layer.update(*joining(1))
        layer.update(*joining(1))
        layer.keys.requires_grad_()
        assert layer.extended(1) is None
