"""The control loop end to end: precision follows the traffic, within its limits, and no answer is ever wrong."""

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from shifting import EVENING, MORNING, as_quantized, assert_answers_as_published, patched, run, upgraded
from torch import Tensor, nn

import dynaexq
import dynaexq.runtime.experts
from dynaexq.errors import ClosedError, SettingsError, StoreError
from dynaexq.memory import ManualCopier, RamStore, SwapPipeline
from dynaexq.types import BITS

TIER_CHOICES = [("int2", "int4"), ("int4", "int8"), ("int2", "int8"), ("int4", "fp16"), ("int2", "fp16")]
two_tiers = pytest.mark.parametrize("tiers", TIER_CHOICES, ids="-".join)


@pytest.fixture
def original() -> nn.Module:
    return tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64)


@two_tiers
def test_precision_follows_the_traffic(tiers: tuple[str, ...]) -> None:
    model = patched(tiers)
    for routes in (MORNING, EVENING, MORNING):
        tiny.steer(model, routes)
        run(model, 4)
        assert upgraded(model) == [sorted(row[0]) for row in routes]
        assert set(model.dynaexq.tiers().ravel()) == {BITS[tiers[0]], BITS[tiers[1]]}
    stats = model.dynaexq.stats()
    assert stats["promotions"] - stats["demotions"] == stats["upgraded"] == 4
    assert stats["bytes_copied"] == stats["promotions"] * model.dynaexq.plan.upgrade.nbytes
    assert stats["failed"] == stats["refused"] == 0


def test_what_arrives_between_two_ticks_is_published_with_the_next_forward() -> None:
    model = patched()
    tiny.steer(model, MORNING)
    run(model, 4)
    pipeline = model.dynaexq.devices[0].pipeline
    pipeline.copier = copier = ManualCopier()
    tiny.steer(model, EVENING)
    while len(copier.pending) < 4:
        run(model, 1)
    model.dynaexq.devices[0].steps.update_interval = 1000
    ticks, before = model.dynaexq.stats()["ticks"], upgraded(model)
    copier.complete(0)
    assert upgraded(model) == before
    run(model, 1)
    assert sum(map(len, upgraded(model))) == sum(map(len, before)) + 1
    assert model.dynaexq.stats()["ticks"] == ticks
    copier.synchronize()


def test_what_fails_between_two_ticks_is_told_by_the_next_and_generation_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = patched()
    runtime = model.dynaexq.devices[0]
    monkeypatch.setattr(SwapPipeline, "num_in_flight", 1)
    monkeypatch.setattr(SwapPipeline, "settle", lambda pipeline: 1 / 0)
    runtime.steps.update_interval = 1000
    run(model, 2)
    assert model.dynaexq.health().state == "ok"
    runtime.steps.update_interval = 1
    run(model, 1)
    assert "ZeroDivisionError" in model.dynaexq.health().why


@two_tiers
def test_mixed_tiers_answer_as_the_dequantized_weights_do(tiers: tuple[str, ...], original: nn.Module) -> None:
    model = patched(tiers, slots=7)
    exact = tiny.logits(original)
    assert (exact - tiny.logits(as_quantized(original, model))).abs().max() > 0.1, "too small a difference to see"
    tiny.generated(model, new_tokens=20)
    assert_answers_as_published(model, original)


@two_tiers
def test_answers_stay_right_while_threads_generate_and_precision_moves(
    tiers: tuple[str, ...], original: nn.Module
) -> None:
    model = patched(tiers, half_life=2, hysteresis=0.0)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for round in range(6):
                ids = tiny.prompt(seed=100 * seed + round)
                assert model.generate(ids, max_new_tokens=6, do_sample=False).shape == (2, 18)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    model.dynaexq.tick()  # fills a slot that was still being read when somebody wanted it
    stats = model.dynaexq.stats()
    assert stats["demotions"] > 0, "nothing moved"
    assert stats["upgraded"] == stats["slots"] == 4
    assert_answers_as_published(model, original)


@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16")], ids="-".join)
def test_the_disk_holds_what_memory_holds(tiers: tuple[str, ...]) -> None:
    outcomes = []
    for host_copy in ("ram", "disk"):
        model = patched(tiers, host_copy=host_copy)
        for routes in (MORNING, EVENING):
            tiny.steer(model, routes)
            answer = run(model)
            outcomes.append((upgraded(model), answer.tolist()))
        assert upgraded(model) == [[6, 7], [0, 5]]
    assert outcomes[:2] == outcomes[2:]


@two_tiers
def test_the_same_input_makes_the_same_decisions(tiers: tuple[str, ...]) -> None:
    def history() -> list[Any]:
        model, steps = patched(tiers, half_life=4, hysteresis=0.0, auto_pause=False), []
        for seed in range(8):
            answer = tiny.logits(model, tiny.prompt(seed=seed))
            steps.append((model.dynaexq.tiers().tolist(), model.dynaexq.hotness().tolist(), answer.tolist()))
        return steps

    first = history()
    assert len({str(tiers) for tiers, _, _ in first}) > 1, "nothing moved"
    assert history() == first


@two_tiers
def test_the_start_is_filled_by_the_error_that_an_upgrade_removes(tiers: tuple[str, ...], original: nn.Module) -> None:
    with torch.no_grad():  # heavy tails lie badly on a uniform grid
        for layer, expert in ((0, 1), (0, 4), (1, 2), (1, 7)):
            tiny.sparse_blocks(original)[layer].experts.gate_up_proj[expert].pow_(3)
    assert upgraded(patched(tiers, model=original)) == [[1, 4], [2, 7]]


@two_tiers
def test_of_experts_equally_hot_the_one_that_gains_more_is_upgraded(
    tiers: tuple[str, ...], original: nn.Module
) -> None:
    with torch.no_grad():
        for block in tiny.sparse_blocks(original):
            block.experts.gate_up_proj[5].pow_(3)
    model = patched(tiers, slots=2, model=original)
    tiny.steer(model, [[[0, 1], [4, 5]]] * 2)
    run(model)
    assert upgraded(model) == [[5], [5]]


def test_layers_compete_for_slots_or_get_equal_shares() -> None:
    four_in_the_first_layer = [[[0, 1], [2, 3]], [[4, 5]]]
    for allocation, expected in (("global", [[0, 1, 2, 3], []]), ("per_layer", [[0, 1], [4, 5]])):
        model = patched(allocation=allocation)
        tiny.steer(model, four_in_the_first_layer)
        quiet = tiny.sparse_blocks(model)[1].gate
        quiet.register_forward_hook(lambda gate, args, out: (out[0], out[1] / 1000, out[2]))
        run(model, 8)
        found = upgraded(model)
        assert [len(row) for row in found] == [len(row) for row in expected]
        assert found[1] == expected[1]
        assert set(found[0]) <= {0, 1, 2, 3}


def test_a_threshold_lets_in_only_what_is_hot_enough() -> None:
    model = patched(policy="threshold", tau_h=0.4, tau_c=0.1)
    before = upgraded(model)
    everyone = [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2  # a quarter of the tokens each: hotness 0.125
    tiny.steer(model, everyone)
    run(model)
    assert upgraded(model) == before
    tiny.steer(model, EVENING)  # hotness 0.5 each
    run(model)
    assert upgraded(model) == [[6, 7], [0, 5]]
    tiny.steer(model, [[[0, 1], [2, 3], [6, 7]], [[0, 5], [1, 2], [3, 4]]])  # a third each: hotness 0.17
    run(model, 8)
    assert upgraded(model) == [[6, 7], [0, 5]]


def test_a_frozen_policy_keeps_the_start_and_still_observes() -> None:
    model = patched(policy="frozen")
    before, answer = upgraded(model), tiny.logits(model)
    tiny.steer(model, EVENING)
    run(model)
    assert upgraded(model) == before
    assert model.dynaexq.hotness()[0].argsort()[-2:].tolist() in ([6, 7], [7, 6])
    tiny.steer(model, None)
    assert torch.equal(tiny.logits(model), answer)


def test_a_policy_of_ones_own_is_obeyed() -> None:
    seen = []

    def last_four(score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
        seen.append((score.shape, upgraded.dtype, slots))
        return np.arange(16).reshape(2, 8) >= 12

    model = patched(policy=last_four)
    run(model)
    assert upgraded(model) == [[], [4, 5, 6, 7]]
    assert set(seen) == {((2, 8), np.dtype(bool), 4)}


BAD_POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": lambda score, upgraded, slots: None,
    "another shape": lambda score, upgraded, slots: np.zeros(16, dtype=bool),
    "numbers": lambda score, upgraded, slots: np.zeros((2, 8), dtype=int),
    "too many": lambda score, upgraded, slots: np.arange(16).reshape(2, 8) >= 11,
}


@pytest.mark.parametrize("policy", BAD_POLICIES.values(), ids=BAD_POLICIES)
def test_a_policy_that_answers_nonsense_is_named_and_changes_nothing(policy: Callable[..., Any]) -> None:
    model = patched(policy=policy, update_interval=10**6)
    before, stats, answer = upgraded(model), model.dynaexq.stats(), tiny.logits(model)
    for _ in range(2):  # and the tick after it is not blocked
        with pytest.raises(SettingsError, match=r"policy must return at most 4 True in a bool array \(2, 8\), got "):
            model.dynaexq.tick()
    assert upgraded(model) == before
    assert model.dynaexq.stats()["promotions"] == stats["promotions"]
    assert torch.equal(tiny.logits(model), answer)


@pytest.mark.parametrize(("hysteresis", "moves"), [(0.1, True), (3.0, False)], ids=["small", "large"])
def test_a_newcomer_has_to_beat_the_incumbent_by_the_margin(hysteresis: float, moves: bool) -> None:
    model = patched(hysteresis=hysteresis, half_life=100)
    tiny.steer(model, MORNING)
    run(model, 8)
    assert upgraded(model) == [[0, 1], [2, 3]]
    twice_as_hot = [[old, new, new] for (old,), (new,) in zip(MORNING, EVENING, strict=True)]
    tiny.steer(model, twice_as_hot)
    run(model, 20)
    assert upgraded(model) == ([[6, 7], [0, 5]] if moves else [[0, 1], [2, 3]])


def test_decisions_come_every_so_many_forwards() -> None:
    model = patched(update_interval=3)
    for forwards in range(1, 10):
        tiny.logits(model, tiny.prompt(batch=1, length=8))
        # The tick comes before a forward is computed, and sees what was routed until then.
        assert model.dynaexq.stats()["steps"] == forwards
        assert model.dynaexq.stats()["ticks"] == forwards // 3
    model.dynaexq.tick()
    assert model.dynaexq.stats()["ticks"] == 4


def test_a_decision_comes_sooner_where_forwards_see_many_tokens() -> None:
    model = patched(update_interval=32)
    for forwards in range(1, 12):
        tiny.logits(model)  # 24 tokens; eight for each of 32 forwards are 256
        assert model.dynaexq.stats()["ticks"] == 0, forwards
    tiny.logits(model, tiny.prompt(batch=1, length=1))
    assert model.dynaexq.stats()["ticks"] == 1, "what the eleven saw is decided upon before the twelfth"
    tiny.logits(model, tiny.prompt(batch=2, length=128))
    assert model.dynaexq.stats()["ticks"] == 1, "a long prompt counts when it has been seen"
    tiny.logits(model, tiny.prompt(batch=1, length=1))
    assert model.dynaexq.stats()["ticks"] == 2


FORGETTING = {
    "half_life": ({"half_life": 48}, 2 ** -(24 / 48)),
    "alpha": ({"half_life": None, "alpha": 0.75}, 0.75),
}


@pytest.mark.parametrize(("options", "kept"), FORGETTING.values(), ids=FORGETTING)
@pytest.mark.parametrize("forwards", [1, 3])
def test_hotness_forgets_by_tokens_or_by_steps(options: dict[str, Any], kept: float, forwards: int) -> None:
    model = patched(update_interval=10**6, **options)
    tiny.steer(model, MORNING)
    run(model, forwards)  # of 24 tokens each
    assert (model.dynaexq.hotness() == 1 / 8).all()
    model.dynaexq.tick()
    expected = np.full((2, 8), kept**forwards / 8)
    expected[[0, 0, 1, 1], [0, 1, 2, 3]] += (1 - kept**forwards) / 2
    np.testing.assert_allclose(model.dynaexq.hotness(), expected, rtol=1e-6)


@pytest.fixture
def slow_reader(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Experts that have looked at the table set the first event, and wait for the second before they compute."""
    arrived, proceed, compute = threading.Event(), threading.Event(), dynaexq.runtime.experts.expert_mlp

    def slow(*args: Any) -> Tensor:
        arrived.set()
        assert proceed.wait(30)
        return compute(*args)

    monkeypatch.setattr(dynaexq.runtime.experts, "expert_mlp", slow)
    return arrived, proceed


@pytest.mark.parametrize("change", ["tick", "set_budget"])
@two_tiers
def test_a_reader_keeps_the_upgrades_it_found(
    tiers: tuple[str, ...], change: str, slow_reader: tuple[threading.Event, threading.Event]
) -> None:
    arrived, proceed = slow_reader
    proceed.set()
    model, outputs = patched(tiers, update_interval=10**6, auto_pause=False), []
    rt = model.dynaexq
    tiny.steer(model, MORNING)
    run(model)
    rt.tick()
    tiny.sparse_blocks(model)[0].register_forward_hook(lambda block, args, output: outputs.append(output))
    run(model, 1)
    tiny.steer(model, EVENING)
    run(model)  # the next tick will want other experts
    tiny.steer(model, MORNING)

    proceed.clear()
    arrived.clear()
    reader = threading.Thread(target=tiny.logits, args=(model,))
    reader.start()
    assert arrived.wait(30)
    least = rt.memory()["total"] - rt.memory()["upgrade"]
    changer = threading.Thread(target=rt.tick if change == "tick" else lambda: rt.set_budget(least))
    changer.start()
    if change == "tick":
        changer.join(30)
        assert not changer.is_alive(), "a tick never waits"
    deadline = time.monotonic() + 30
    while upgraded(model) != [[], []]:
        assert time.monotonic() < deadline, "no slot is free for others before the reader has finished"
        time.sleep(0.01)
    if change == "set_budget":
        changer.join(0.1)
        assert changer.is_alive(), "memory that is read is not freed"
    proceed.set()
    reader.join()
    changer.join()
    assert torch.equal(outputs[-1], outputs[0]), "bytes changed under a reader"

    tiny.steer(model, EVENING)
    run(model)
    rt.tick()
    assert upgraded(model) == ([[6, 7], [0, 5]] if change == "tick" else [[], []])


def test_traffic_is_counted() -> None:
    model = patched(update_interval=10**6)
    hot = model.dynaexq.tiers() > 2
    run(model, 2)
    model.dynaexq.tick()
    mass, stats = model.dynaexq.routed_mass(), model.dynaexq.stats()
    assert stats["tokens"] == 2 * 24
    np.testing.assert_allclose(mass.sum(1), 2 * 24, rtol=1e-4)  # the weights of a token sum to one
    np.testing.assert_allclose(stats["hot_coverage"], mass[hot].sum() / mass.sum())
    tiny.steer(model, MORNING)
    run(model, 1)
    np.testing.assert_allclose(model.dynaexq.routed_mass()[0, :2] - mass[0, :2], 12)


def test_a_step_of_training_is_counted_as_one_forward() -> None:
    model, seen = patched().train(), patched()
    model(tiny.prompt(), labels=tiny.prompt()).loss.backward()
    tiny.logits(seen)
    assert model.dynaexq.stats()["steps"] == 1
    np.testing.assert_array_equal(model.dynaexq.routed_mass(), seen.dynaexq.routed_mass())
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in tiny.sparse_blocks(model))


def failing_read(self: RamStore, index: int, out: Tensor) -> None:
    out.fill_(0xEE)
    raise StoreError("by the test")


def test_a_store_that_always_fails_leaves_every_expert_at_its_base(
    original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RamStore, "read_into", failing_read)
    model = patched()
    assert 0 < model.dynaexq.stats()["failed"] <= 16
    for routes in (MORNING, EVENING, None):
        tiny.steer(model, routes)
        run(model, 8)
        assert upgraded(model) == [[], []]
    assert model.dynaexq.stats()["failed"] < 16 + 24, "one probe now and then, and ever less"
    assert model.dynaexq.health().state == "standing still"
    assert tiny.generated(model)
    assert_answers_as_published(model, original)


def test_a_store_that_recovers_is_used_again(original: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    tiny.steer(model, MORNING)
    run(model)
    before = model.dynaexq.stats()
    tiny.steer(model, EVENING)
    with monkeypatch.context() as broken:
        broken.setattr(RamStore, "read_into", failing_read)
        run(model, 3)
    after = model.dynaexq.stats()
    assert after["failed"] > before["failed"]
    assert after["promotions"] == before["promotions"]
    run(model, 3)
    assert upgraded(model) == [[6, 7], [0, 5]]
    tiny.steer(model, None)
    assert_answers_as_published(model, original)


def test_no_upgrade_is_taken_away_while_copies_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    tiny.steer(model, MORNING)
    run(model)
    assert upgraded(model) == [[0, 1], [2, 3]]
    monkeypatch.setattr(RamStore, "read_into", failing_read)
    tiny.steer(model, [EVENING[0], MORNING[1]])
    run(model, 2)
    tiny.steer(model, EVENING)
    run(model, 8)
    assert upgraded(model) == [[], [2, 3]], "the first failure cost the first layer its upgrades, and was a warning"


def test_a_policy_that_fails_during_generation_freezes_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = patched(policy=BAD_POLICIES["too many"], update_interval=1)
    before = upgraded(model)
    assert tiny.generated(model)
    assert upgraded(model) == before
    assert sum("policy failed" in record.message for record in caplog.records) == 1


def test_traffic_stays_below_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr("dynaexq.policy.rate_limit.time", clock)
    slot = patched().dynaexq.plan.upgrade.nbytes
    model = patched(copy_rate_limit=slot)  # one upgrade a second
    start, cold = model.dynaexq.stats()["bytes_copied"], tiny.cold_routes(model)
    tiny.steer(model, cold)
    for _ in range(40):
        clock.now += 0.25
        tiny.logits(model)
        # What was saved up is at most one second's worth, or one upgrade.
        assert model.dynaexq.stats()["bytes_copied"] - start <= slot * (1 + clock.now)
    assert upgraded(model) == [hot for (hot,) in cold]
    clock.now += 1000.0
    before = model.dynaexq.stats()["bytes_copied"]
    tiny.steer(model, tiny.cold_routes(model))
    run(model, 3)
    assert model.dynaexq.stats()["bytes_copied"] - before <= slot


def test_a_share_of_the_link_limits_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = patched().dynaexq.plan.upgrade.nbytes
    monkeypatch.setattr("dynaexq.memory.device_memory.measure_link", lambda device: 4.0 * slot)
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr("dynaexq.policy.rate_limit.time", clock)
    model = patched(copy_rate_limit=0.5)
    start = model.dynaexq.stats()["bytes_copied"]
    tiny.steer(model, tiny.cold_routes(model))
    run(model)
    assert model.dynaexq.stats()["bytes_copied"] - start == slot
    clock.now += 1.0
    run(model)
    assert model.dynaexq.stats()["bytes_copied"] - start == 3 * slot


def test_a_closed_device_refuses_whatever_would_need_its_memory() -> None:
    runtime = patched().dynaexq
    device, budget = runtime.devices[0], runtime.plan.budget
    runtime.close()
    hotness = np.zeros(device.memory.table.kinds().shape)
    calls = (device.tick, device.drain, device.thaw, lambda: device.slots_within(budget, 0))
    for call in (*calls, lambda: device.warm_start(hotness)):
        with pytest.raises(ClosedError):
            call()


def test_the_report_says_which_threads_the_kernel_takes() -> None:
    assert "kernel threads" in str(patched().dynaexq.report())


def test_a_larger_budget_is_filled_before_it_returns() -> None:
    runtime = patched().dynaexq
    for slots in (0, 3):
        parts = runtime.memory()
        runtime.set_budget(parts["total"] - parts["upgrade"] + slots * runtime.plan.upgrade.nbytes)
        assert runtime.stats()["upgraded"] == slots


def test_no_store_is_left_open_where_no_copier_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def none(*_: object, **__: object) -> None:
        raise StoreError("no copier")

    monkeypatch.setattr(RamStore, "close", lambda store: closed.append(store))
    monkeypatch.setattr("dynaexq.runtime.device_runtime.copier_for", none)
    with pytest.raises(StoreError, match="no copier"):
        patched()
    assert len(closed) == 1


def test_a_pipeline_has_counted_nothing_before_anything_moves() -> None:
    pipeline = patched(policy="frozen").dynaexq.devices[0].pipeline
    fresh = type(pipeline.counts)()
    assert set(vars(fresh).values()) == {0}
