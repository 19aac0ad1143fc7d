"""The budget is a ceiling: on what is really allocated, for any budget, through every change of it."""

import copy
import gc
import re
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import patching
import psutil
import pytest
import tiny
import torch
from torch import nn

import dynaexq
import dynaexq.memory.slab_pool
from dynaexq.errors import BudgetError, SettingsError
from dynaexq.hf.model_patch import ModelPatch
from dynaexq.memory import DiskStore, RamStore
from dynaexq.runtime.device_runtime import CEILING_INTERVAL
from dynaexq.weights.quantize_experts import SourceStore

TIER_CHOICES = {
    "-".join(tiers) if isinstance(tiers, tuple) else tiers: tiers
    for tiers in (
        "auto",
        ("fp16",),
        ("int8",),
        ("int2",),
        ("int2", "int4"),
        ("int2", "int8"),
        ("int4", "int8"),
        ("int4", "fp16"),
        ("int2", "fp16"),
    )
}
TWO_TIERS = [tiers for tiers in TIER_CHOICES.values() if len(tiers) == 2]
AMPLE = 10**6

two_tiers = pytest.mark.parametrize("tiers", TWO_TIERS, ids="-".join)


def reachable_bytes(model: nn.Module) -> int:
    """Bytes of every storage that can be reached from `model`; the host's copy of the upgrades aside."""
    elsewhere = (ModelPatch, DiskStore, RamStore, SourceStore, type, types.ModuleType, types.FunctionType)
    storages, seen, queue = {}, set(), [model]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, elsewhere):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        queue.extend(gc.get_referents(thing))
    return sum(storages.values())


def assert_sound(model: nn.Module) -> None:
    """What holds whenever nobody is moving anything."""
    rt = model.dynaexq
    memory, stats = rt.memory(), rt.stats()
    parts = ("dense", "base", "upgrade", "staging", "workspace")
    assert memory["total"] == sum(memory[part] for part in parts) == reachable_bytes(model)
    assert memory["total"] <= memory["budget"]
    assert stats["upgraded"] <= stats["slots"] <= rt.tiers().size
    assert stats["in_flight"] == 0
    assert np.count_nonzero(rt.tiers() > rt.plan.base.bits) == stats["upgraded"]


def slot_bytes(rt: dynaexq.Runtime) -> int:
    return rt.plan.upgrade.nbytes


def refusal(model: nn.Module, budget: int, tiers: str | tuple[str, ...]) -> BudgetError | None:
    """Patch `model`, or say why not."""
    try:
        patching.patch(model, budget, tiers=tiers, quantizer="rtn")
    except BudgetError as error:
        return error
    return None


@pytest.mark.parametrize("build", [tiny.tiny_qwen3_moe, tiny.tiny_qwen3_next], ids=["qwen3_moe", "qwen3_next"])
def test_no_budget_is_ever_exceeded(build: Callable[[], nn.Module]) -> None:
    rng = np.random.default_rng(0)
    original = build()
    for budget in np.exp(rng.uniform(np.log(20_000), np.log(800_000), 200)).astype(int).tolist():
        tiers = list(TIER_CHOICES.values())[rng.integers(len(TIER_CHOICES))]
        model = copy.deepcopy(original)
        error = refusal(model, budget, tiers)
        if error is not None:
            assert error.budget == budget < error.least
            assert str(error.least) in re.findall(r"\d+", str(error))
            assert refusal(model, error.least - 1, tiers) is not None
            assert refusal(model, error.least, tiers) is None
        rt = model.dynaexq
        assert_sound(model)
        assert rt.stats()["upgraded"] == rt.stats()["slots"], "an idle slot while an expert lacks an upgrade"
        if rt.plan.upgrade and rt.stats()["slots"] < rt.tiers().size:
            assert rt.memory()["total"] + slot_bytes(rt) > rt.memory()["budget"], "room for one more was left unused"


def test_sixteen_bits_of_a_float32_model_are_budgeted_as_thirty_two() -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    whole = sum(p.nbytes for p in model.parameters())
    rt = dynaexq.patch(model, AMPLE, tiers=("fp16",))
    assert whole < rt.memory()["total"] < whole + 10_000


def test_tied_weights_are_counted_once() -> None:
    model = tiny.tiny_qwen3_moe(tie_word_embeddings=True)
    dynaexq.patch(model, AMPLE, tiers=("int4",))
    assert_sound(model)


def test_the_original_experts_are_freed() -> None:
    model = tiny.tiny_qwen3_moe()
    before = reachable_bytes(model)
    rt = dynaexq.patch(model, AMPLE, tiers=("int4",))
    gc.collect()
    alive = {
        id(t): t.nbytes for t in gc.get_objects() if isinstance(t, nn.Parameter) and t.ndim == 3 and not t.is_meta
    }
    assert not alive
    assert rt.memory()["total"] < before


@contextmanager
def keeps_generating(model: nn.Module) -> Iterator[None]:
    """Generate in a second thread for the length of the block; what goes wrong there is raised here."""
    stop, errors, rounds = threading.Event(), [], 0

    def work() -> None:
        nonlocal rounds
        try:
            while not stop.is_set():
                tiny.generated(model)
                rounds += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not errors, errors
    assert rounds, "nothing was generated meanwhile"


@two_tiers
def test_the_budget_goes_up_and_down_while_the_model_runs(tiers: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    model = tiny.tiny_qwen3_moe()
    rt = patching.patch(model, AMPLE, tiers=tiers, quantizer="rtn", update_interval=1, half_life=4)
    most, memory = tiny.logits(model), rt.memory()
    least = memory["total"] - memory["upgrade"]
    with keeps_generating(model):
        for budget in rng.integers(least, memory["total"] + 2 * slot_bytes(rt), 30).tolist():
            rt.set_budget(budget)
            assert rt.memory()["total"] <= budget == rt.memory()["budget"] == rt.plan.budget
            assert rt.stats()["slots"] == rt.plan.num_slots == min(16, (budget - least) // slot_bytes(rt))
    assert_sound(model)
    rt.set_budget(least)
    assert (rt.tiers() == rt.plan.base.bits).all()
    assert_sound(model)
    rt.set_budget(AMPLE)
    assert rt.stats()["upgraded"] == 16, "the new slots were left empty"
    assert_sound(model)
    assert torch.equal(tiny.logits(model), most), "the same precisions answered differently"


@two_tiers
def test_no_moment_of_a_resize_exceeds_both_ceilings(tiers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_qwen3_moe()
    rt = patching.patch(model, AMPLE, tiers=tiers, quantizer="rtn")
    allocate, peaks = dynaexq.memory.slab_pool.allocate_bytes, []

    def observed(nbytes: int, device: torch.device) -> torch.Tensor:
        peaks.append(reachable_bytes(model) + nbytes)
        return allocate(nbytes, device)

    monkeypatch.setattr(dynaexq.memory.slab_pool, "allocate_bytes", observed)
    full = rt.memory()["total"]
    for slots in (16, 9, 15, 3, 4, 0, 11):
        budget = full - (16 - slots) * slot_bytes(rt)
        ceiling = max(budget, rt.plan.budget)
        rt.set_budget(budget)
        assert rt.stats()["slots"] == slots
        assert all(peak <= ceiling for peak in peaks)
        peaks.clear()


@two_tiers
def test_a_budget_too_small_changes_nothing(tiers: tuple[str, ...]) -> None:
    model = tiny.tiny_qwen3_moe()
    rt = patching.patch(model, 190_000, tiers=tiers, quantizer="rtn")
    before = (rt.plan, rt.memory(), rt.stats(), rt.tiers().tolist(), tiny.logits(model).tolist())
    with pytest.raises(BudgetError) as caught:
        rt.set_budget("50KB")
    assert caught.value.budget == 50_000
    with pytest.raises(BudgetError):
        rt.set_budget(caught.value.least - 1)
    with pytest.raises(SettingsError):
        rt.set_budget("190 KBit")
    stats = rt.stats() | {name: before[2][name] for name in ("steps", "ticks")}  # of the forward above
    assert before[:4] == (rt.plan, rt.memory(), stats, rt.tiers().tolist())
    assert before[4] == tiny.logits(model).tolist()
    rt.set_budget(caught.value.least)
    assert_sound(model)


def test_a_ladder_of_one_tier_takes_any_budget_above_its_base() -> None:
    model = tiny.tiny_qwen3_moe()
    rt = dynaexq.patch(model, AMPLE, tiers=("int4",))
    rt.set_budget(rt.memory()["total"])
    assert_sound(model)
    assert rt.stats()["slots"] == 0


def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Key-value cache of `tokens` tokens, from that of the prompt."""
    with torch.no_grad():
        cache = model(tiny.prompt(), use_cache=True).past_key_values
    return (
        sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) * tokens // tiny.prompt().numel()
    )


def free_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=nbytes))


@pytest.mark.parametrize("tiers", TIER_CHOICES.values(), ids=TIER_CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_auto_leaves_room_for_the_context(
    tiers: str | tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_qwen3_moe(dtype, num_key_value_heads=2, head_dim=256)
    held = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    context = cache_bytes(model, tokens=2 * 300)
    for free in (context, 2 * context, 10 * context):
        unpatched = copy.deepcopy(model)
        free_memory(monkeypatch, free)
        try:
            rt = patching.patch(unpatched, "auto", tiers=tiers, device="cpu", max_context=300, max_batch=2)
        except (SettingsError, BudgetError):
            assert free < 10 * context, "there was room enough"
            continue
        assert_sound(unpatched)
        assert free + held - rt.memory()["total"] - rt.stats()["host_bytes"] >= context


@pytest.mark.parametrize("tiers", TWO_TIERS, ids="-".join)
def test_auto_leaves_room_for_the_copy_of_the_upgrades_on_a_cpu(
    tiers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum(p.nbytes for p in tiny.tiny_qwen3_moe().parameters())
    fitted = 0
    for free in range(0, 400_000, 50_000):
        model = tiny.tiny_qwen3_moe()
        free_memory(monkeypatch, free)
        try:
            rt = patching.patch(model, "auto", tiers=tiers, device="cpu", max_context=1, quantizer="rtn")
        except (SettingsError, BudgetError):
            continue
        fitted += 1
        assert rt.memory()["total"] + rt.stats()["host_bytes"] <= free + held
    assert fitted >= 3


def test_auto_refuses_where_the_context_alone_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_qwen3_moe()
    before = tiny.anatomy(model)
    free_memory(monkeypatch, AMPLE)
    with pytest.raises(SettingsError, match=r"max_context=100000, max_batch=4 need .*lower these or give hbm_budget"):
        patching.patch(model, device="cpu", max_context=100_000, max_batch=4)
    assert tiny.anatomy(model) == before


def test_auto_gives_less_to_the_weights_the_longer_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 50 * AMPLE)
    budgets = [
        patching.patch(tiny.tiny_qwen3_moe(), device="cpu", max_context=tokens).plan.budget
        for tokens in (512, 4096, 16384)
    ]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] > budgets[2] + 10 * AMPLE


def cast_behind_our_back(model: nn.Module) -> None:
    """What `peft.prepare_model_for_kbit_training` does to every weight that it finds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)


def test_weights_that_others_cast_are_made_up_for_by_upgrades_and_set_budget_gets_them_back():
    model = tiny.tiny_qwen3_moe()
    runtime = patching.patch(model, "1GiB", tiers=("int4", "int8"), quantizer="rtn", update_interval=1)
    held, slots = runtime.memory(), runtime.stats()["slots"]
    budget = held["total"] + held["dense"] - 5 * runtime.plan.upgrade.nbytes // 2
    runtime.set_budget(budget)
    cast_behind_our_back(model)
    assert runtime.memory()["total"] > budget
    while runtime.memory()["total"] > budget:
        runtime.tick()
    assert runtime.stats()["slots"] == slots - 3
    assert runtime.health().state == "ok"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    runtime.set_budget(budget)
    assert runtime.stats()["slots"] == slots


def test_one_byte_too_many_costs_one_upgrade():
    model = tiny.tiny_qwen3_moe()
    runtime = patching.patch(model, "1GiB", tiers=("int4", "int8"), quantizer="rtn", update_interval=1)
    runtime.set_budget(runtime.memory()["total"])
    slots, before = runtime.stats()["slots"], runtime.memory()["total"]
    model.register_buffer("more", torch.zeros(1, dtype=torch.uint8))
    assert runtime.memory()["total"] == before + 1
    for _ in range(CEILING_INTERVAL):
        runtime.tick()
    assert runtime.stats()["slots"] == slots - 1


def test_what_no_upgrade_can_make_up_for_is_said():
    model = tiny.tiny_qwen3_moe()
    runtime = patching.patch(model, "1GiB", tiers=("int4", "int8"), quantizer="rtn", update_interval=1)
    runtime.set_budget(runtime.memory()["total"] - 16 * runtime.plan.upgrade.nbytes)
    cast_behind_our_back(model)
    for _ in range(CEILING_INTERVAL + 1):
        runtime.tick()
    assert runtime.stats()["slots"] == 0
    excess = runtime.memory()["total"] - runtime.plan.budget
    assert runtime.health().state == "degraded"
    assert f"{excess:,} bytes more are held than hbm_budget=" in runtime.health().why
    runtime.set_budget("1GiB")
    assert runtime.health().state == "ok"
