"""`kv_reserve`: weights and KV cache under one ceiling, at every moment of a growing context."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import dynaexq
from dynaexq.errors import BudgetError, ReentryError, SettingsError
from dynaexq.hf import growing_cache
from dynaexq.hf.planning import growth_of_cache

PER_TOKEN = 2 * 2 * 32 * 2  # two layers of keys and values: one head of 32 elements of two bytes
CONTEXT = 200


def budget_with(model: PreTrainedModel, upgrades: int, cache: int) -> int:
    """Bytes for the bases, so many upgrades, and a cache."""
    runtime = dynaexq.patch(model, "1GiB", tiers=("int4", "int8"), config={"policy": "frozen"})
    memory, slot = runtime.memory(), runtime.devices[0].memory.pool.slot_nbytes
    runtime.close()
    return memory["total"] - memory["upgrade"] + upgrades * slot + cache


def small(upgrades: int = 16, cache: int = 24 * 1024, **config: Any) -> PreTrainedModel:
    """A model of 16 experts, with a budget for bases, `upgrades` and `cache` bytes."""
    budget = budget_with(tiny.tiny_qwen3_moe(), upgrades, cache)
    model = tiny.tiny_qwen3_moe()
    options = {"kv_reserve": "auto", "max_context": 64, "update_interval": 1} | config
    dynaexq.patch(model, budget, tiers=("int4", "int8"), config=options)
    return model


def storages(cache: Cache) -> dict[int, int]:
    """Bytes of the memory that the layers of a cache hold, by address: a naive count."""
    found = {}
    for layer in cache.layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


@contextmanager
def watched(model: PreTrainedModel, kept: list[Cache]) -> Iterator[list[int]]:
    """Bytes of weights and of all caches whenever keys and values are about to join a layer's, and while they do."""
    peaks: list[int] = []
    at_work: list[Cache] = []
    update, with_room = DynamicLayer.update, growing_cache._with_room

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        at_work[:] = [kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None]
        assert at_work or kwargs.get("use_cache") is False, "there is nothing to watch"
        record(0)

    def record(joined: int) -> None:
        held = {}
        for cache in [*kept, *at_work]:
            held |= storages(cache)
        memory = model.dynaexq.memory()
        peaks.append(memory["total"] - memory["kv_reserve"] + sum(held.values()) + joined)

    def joins(self: DynamicLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        record((self.keys.nbytes if self.keys is not None else 0) + keys.nbytes)  # the old and the new
        result = update(self, keys, values, *args, **kwargs)
        record(0)
        return result

    def moves(old: Tensor, tokens: int) -> Tensor:
        beginning = with_room(old, tokens)
        record(beginning.untyped_storage().nbytes())  # the old one is there as well
        return beginning

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in model.model.layers]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DynamicLayer, "update", joins)
        patched.setattr(growing_cache, "_with_room", moves)
        yield peaks
    for handle in handles:
        handle.remove()


def generate(model: PreTrainedModel, new: int, **options: Any) -> Tensor:
    ids = tiny.prompt(1, 12)
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_weights_and_cache_never_pass_the_ceiling(options: dict[str, Any]) -> None:
    model = small()
    runtime = model.dynaexq
    before = runtime.stats()["slots"]
    with watched(model, []) as peaks, torch.no_grad():
        generate(model, CONTEXT // options.get("num_beams", 1), **options)
    assert max(peaks) <= runtime.plan.budget
    if options.get("use_cache", True):
        assert runtime.stats()["slots"] < before, "a budget that nothing was taken from tests nothing"


def test_upgrades_come_back_after_a_context_and_answers_are_those_of_equal_precision() -> None:
    model = small()
    runtime = model.dynaexq
    most = runtime.stats()["slots"]
    with torch.no_grad():
        generate(model, CONTEXT)
        least = runtime.stats()["slots"]
        gc.collect()
        generate(model, 2)
        for _ in range(4):
            runtime.tick()
            runtime.drain()
    slots, memory = runtime.stats()["slots"], runtime.memory()
    assert least < slots - 2 < most
    assert runtime.stats()["upgraded"] == slots
    unused = memory["budget"] - memory["total"]
    assert 0 <= unused < runtime.devices[0].memory.pool.slot_nbytes * (1 + slots // 8)
    assert memory["total"] == sum(memory.values()) - memory["budget"] - memory["total"]


def test_every_context_that_something_holds_counts() -> None:
    model = small()
    kept: list[Cache] = []
    slots = []
    with watched(model, kept) as peaks, torch.no_grad():
        for _ in range(3):
            kept.append(model(tiny.prompt(1, 50)).past_key_values)
            model(tiny.prompt(1, 1), past_key_values=kept[-1])
            slots.append(model.dynaexq.stats()["slots"])
    assert max(peaks) <= model.dynaexq.plan.budget
    assert slots == sorted(slots, reverse=True)
    assert slots[-1] < slots[0]


@torch.no_grad()
def test_a_context_beyond_the_ceiling_is_refused_and_the_next_one_goes_on() -> None:
    model = small(upgrades=2, cache=PER_TOKEN * 64)
    with pytest.raises(BudgetError, match=r"for the KV cache and every expert's .* end other contexts"):
        generate(model, 230)
    gc.collect()
    assert generate(model, 4).shape == (1, 16)
    assert model.dynaexq.memory()["total"] <= model.dynaexq.plan.budget


@torch.no_grad()
def test_without_a_slot_to_spare_room_is_made_for_what_is_needed_and_no_more() -> None:
    """A stride ahead would not fit; one of the four tensors is there twice while it grows."""
    for tokens in range(54, 80, 2):
        model = small(upgrades=0, cache=PER_TOKEN * tokens, max_context=32)
        with watched(model, []) as peaks, suppress(BudgetError):
            assert generate(model, 40).shape == (1, 52)
            break
    assert tokens < 72
    assert model.dynaexq.plan.budget - PER_TOKEN * 8 < max(peaks) <= model.dynaexq.plan.budget


def test_a_frozen_policy_gets_its_upgrades_back_as_well() -> None:
    model = small(policy="frozen")
    most = model.dynaexq.stats()["upgraded"]
    with torch.no_grad():
        generate(model, CONTEXT)
        least = model.dynaexq.stats()["upgraded"]
        gc.collect()
        generate(model, 2)
        model.dynaexq.tick()
        model.dynaexq.drain()
    assert least < model.dynaexq.stats()["upgraded"] - 2 < most


def test_a_size_is_kept_free_whatever_the_contexts_take() -> None:
    budget = budget_with(tiny.tiny_qwen3_moe(), 4, 0)
    model = tiny.tiny_qwen3_moe()
    runtime = dynaexq.patch(model, budget + 2**20, tiers=("int4", "int8"), config={"kv_reserve": "1MiB"})
    assert runtime.stats()["slots"] == 4
    assert runtime.memory()["kv_reserve"] == 2**20
    assert budget < runtime.memory()["total"] + 4096 <= budget + 2**20 + 4096
    with torch.no_grad():
        generate(model, 20)
    assert runtime.stats()["slots"] == 4
    runtime.set_budget(budget + 2**20 - 2 * runtime.devices[0].memory.pool.slot_nbytes)
    assert runtime.stats()["slots"] <= 2


def test_a_reserve_that_leaves_too_little_is_refused_by_name() -> None:
    budget = budget_with(tiny.tiny_qwen3_moe(), 1, 0)
    with pytest.raises(BudgetError, match="beside the 1,048,576 that kv_reserve=1048576 keeps"):
        dynaexq.patch(tiny.tiny_qwen3_moe(), budget, config={"kv_reserve": "1MiB", "tiers": ("int4", "int8")})
    with pytest.raises(BudgetError, match=r"kv_reserve='auto' keeps for the KV cache, .* max_context") as caught:
        small(upgrades=0, cache=PER_TOKEN * 63)
    assert small(upgrades=0, cache=PER_TOKEN * 64).dynaexq.plan.budget == caught.value.least
    with pytest.raises(SettingsError, match="kv_reserve must be a positive number"):
        dynaexq.DynaExqConfig(kv_reserve="some").settings()


def test_the_pages_of_continuous_batching_count_once_they_are_there() -> None:
    model = small(upgrades=16, cache=PER_TOKEN * 64)
    options = ContinuousBatchingConfig(block_size=32, num_blocks=4, max_batch_tokens=32)
    prompts = [tiny.prompt(1, 6, seed)[0].tolist() for seed in (1, 2)]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=options)
    assert [len(answer.generated_tokens) for answer in found.values()] == [4, 4]
    assert model.dynaexq.memory()["kv_reserve"] >= 4 * 32 * PER_TOKEN
    assert model.dynaexq.memory()["total"] <= model.dynaexq.plan.budget


@torch.no_grad()
def test_contexts_that_grow_at_once_in_several_threads_stay_below_the_ceiling() -> None:
    model = small(upgrades=16, cache=64 * 1024)
    kept: list[Cache] = [DynamicCache(config=model.config) for _ in range(3)]

    def chat(number: int) -> int:
        with torch.no_grad():
            for step in (30, *[1] * 25, 20, *[1] * 10):
                model(tiny.prompt(1, step, number), past_key_values=kept[number])
        return kept[number].get_seq_length()

    with watched(model, kept) as peaks, ThreadPoolExecutor(3) as people:
        assert list(people.map(chat, range(3))) == [85] * 3
    assert max(peaks) <= model.dynaexq.plan.budget


@torch.no_grad()
def test_a_policy_that_asks_the_model_is_told_why_it_may_not() -> None:
    told = []

    def policy(score: Any, held: Any, slots: int) -> Any:
        try:
            model(tiny.prompt(1, 30))
        except ReentryError as error:
            told.append(str(error))
        return held

    model = small(policy=policy)
    for _ in range(3):
        model(tiny.prompt(1, 8))
    assert told
    assert model.dynaexq.health().state == "ok"


def test_unpatching_and_closing_end_the_watch() -> None:
    model = tiny.tiny_qwen3_moe()
    hooks = len(model._forward_pre_hooks)
    runtime = dynaexq.patch(model, "1GiB", tiers=("int4", "fp16"), config={"kv_reserve": "auto"})
    assert len(model._forward_pre_hooks) == hooks + 3  # the door, caches that grow, their room
    runtime.close()
    tiny.logits(model)
    dynaexq.unpatch(model)
    assert len(model._forward_pre_hooks) == hooks


def test_a_checkpoint_is_loaded_with_a_reserve(tmp_path: Any) -> None:
    tiny.tiny_qwen3_moe().save_pretrained(tmp_path)
    config = dynaexq.DynaExqConfig(hbm_budget="1GiB", kv_reserve="auto", tiers=("int4", "int8"))
    model = type(tiny.tiny_qwen3_moe()).from_pretrained(tmp_path, quantization_config=config)
    tiny.logits(model)
    assert model.dynaexq.memory()["kv_reserve"] > 0


def sliding() -> PreTrainedModel:
    sizes = {name: value for name, value in tiny.SIZES.items() if name in MixtralConfig().to_dict()}
    config = MixtralConfig(**sizes, num_local_experts=8, intermediate_size=32, sliding_window=16)
    return MixtralForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("make", [tiny.tiny_qwen3_moe, tiny.tiny_qwen3_next, sliding])
@torch.no_grad()
def test_what_a_context_is_said_to_take_is_what_it_takes(make: Callable[[], PreTrainedModel]) -> None:
    """Growth from any length is at most that from nothing, so room for a stride is enough for it."""
    model = make()
    growth = growth_of_cache(model)
    cache = DynamicCache(config=model.config)
    before = 0
    for tokens in (1, 5, 20, 130):
        model(tiny.prompt(2, tokens), past_key_values=cache)
        now = sum(
            t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor) and t.ndim > 2
        )
        assert now - before <= growth(tokens, 2)
        before = now
