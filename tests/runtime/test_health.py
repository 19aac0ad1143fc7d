"""Adaptation heals itself: whatever fails, and for however long, it goes on once that is over, and says so."""

import logging

import numpy as np
import pytest
import tiny
import torch
from shifting import EVENING, MORNING, patched, run, upgraded
from torch import Tensor

import dynaexq
from dynaexq import Health
from dynaexq.memory import ManualCopier, RamStore
from dynaexq.memory.retries import LONGEST_BAR, LONGEST_REST, Retries


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch):
    """Switch the store off and on again."""
    read, out = RamStore.read_into, {"age": False}

    def read_into(self: RamStore, index: int, to: Tensor) -> None:
        if out["age"]:
            raise OSError("the store is away")
        read(self, index, to)

    monkeypatch.setattr(RamStore, "read_into", read_into)
    return lambda away: out.update(age=away)


def test_a_failed_copy_and_a_smaller_budget_do_not_stop_precision(outage) -> None:
    model = patched(auto_pause=False, hysteresis=0.0)
    runtime = model.dynaexq
    tiny.steer(model, MORNING)
    run(model, 8)
    outage(True)
    tiny.steer(model, EVENING)
    run(model, 3)
    outage(False)
    runtime.set_budget(runtime.plan.budget - 2 * runtime.plan.upgrade.nbytes)
    tiny.steer(model, EVENING)
    run(model, 24)
    assert runtime.stats()["upgraded"] == 2
    assert {(layer, e) for layer, row in enumerate(upgraded(model)) for e in row} <= {(0, 6), (0, 7), (1, 0), (1, 5)}
    assert runtime.health().state == "ok"


def test_an_outage_is_told_once_probed_ever_less_and_over_with_the_first_copy(outage, caplog) -> None:
    model = patched(auto_pause=False, hysteresis=0.0)
    runtime = model.dynaexq
    tiny.steer(model, MORNING)
    run(model, 8)
    assert runtime.health().state == "ok"
    outage(True)
    with caplog.at_level(logging.INFO, logger="dynaexq.runtime.health"):
        tiny.steer(model, [EVENING[0], MORNING[1]])
        run(model, 4)
        left = runtime.stats()["upgraded"]
        for i in range(200):
            tiny.steer(model, [EVENING, MORNING][i // 20 % 2])
            run(model, 1)
        health = runtime.health()
        assert health.state == "standing still"
        assert "the store is away" in health.why
        assert health.failed_copies == runtime.stats()["failed"] < 20
        assert "standing still" in str(runtime.report())
        assert runtime.stats()["upgraded"] == left > 0, "what is free is what the store is probed with"
        outage(False)
        tiny.steer(model, EVENING)
        run(model, 2 * LONGEST_REST)
    assert upgraded(model) == [sorted(row[0]) for row in EVENING]
    assert runtime.health().state == "ok"
    said = [record.message.split(":")[0] for record in caplog.records]
    assert len(said) == len([s for i, s in enumerate(said) if i == 0 or s != said[i - 1]]), "each change once"
    assert said[-1] == "precision on cpu follows the traffic again, after it was standing still"


def test_one_expert_whose_bytes_are_gone_keeps_nobody_else_from_its_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    read, gone = RamStore.read_into, 6

    def read_into(self: RamStore, index: int, to: Tensor) -> None:
        if index == gone:
            raise OSError("these bytes are gone")
        read(self, index, to)

    monkeypatch.setattr(RamStore, "read_into", read_into)
    model = patched(auto_pause=False, hysteresis=0.0)
    tiny.steer(model, EVENING)
    run(model, 40)
    tiers = model.dynaexq.tiers()
    base = tiers.min()
    assert tiers[0, 7] > base
    assert (tiers[1, [0, 5]] > base).all()
    assert tiers[0, gone] == base
    health = model.dynaexq.health()
    assert (health.state, health.suspect_experts) == ("degraded", 1)
    assert "these bytes are gone" in health.why


def test_a_tick_that_fails_does_not_stop_the_forward_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = patched()
    device = model.dynaexq.devices[0]
    step = device.control.step

    def failing(*_: object) -> None:
        raise MemoryError("by the test")

    monkeypatch.setattr(device.control, "step", failing)
    run(model, 10)
    assert "standing still" in caplog.text, "the log says so, though nothing has asked"
    health = model.dynaexq.health()
    assert health.state == "standing still"
    assert 1 < health.failed_ticks < 6, "after growing pauses"
    assert "MemoryError" in health.why
    with pytest.raises(MemoryError):
        model.dynaexq.tick()
    monkeypatch.setattr(device.control, "step", step)
    run(model, 40)
    assert model.dynaexq.health().state == "ok"


def test_what_stands_still_by_choice_is_well() -> None:
    model = patched()
    model.dynaexq.freeze()
    health = model.dynaexq.health()
    assert (health.state, health.why) == ("ok", "precision is frozen by choice")
    model.dynaexq.close()
    assert model.dynaexq.health().state == "standing still"


def test_pauses_grow_to_their_limits_and_a_batch_is_one_probe() -> None:
    retries, error = Retries((1, 4)), OSError("gone")
    for expert in range(4):
        retries.failed((0, expert), error)
    assert retries.allowance == 0
    retries.tick()
    assert retries.allowance == 1, "four that failed together are one failure of the store"
    assert not retries.barred.any()
    rests = []
    for _ in range(12):
        retries.failed((0, 0), error)
        rests.append(0)
        while retries.allowance == 0:
            retries.tick()
            rests[-1] += 1
    assert rests == [2, 4, 8, 16, 32, *[LONGEST_REST] * 7]
    retries.arrived((0, 1))
    assert retries.allowance is None
    assert retries.num_suspect == 0, "the store had failed, and not the experts"
    for _ in range(40):
        retries.failed((0, 2), error)
        retries.arrived((0, 1))
    assert retries.num_suspect == 1
    retries.now += LONGEST_BAR - 1
    assert retries.barred.tolist() == [[False, False, True, False]]
    retries.tick()
    assert not retries.barred.any()


BAD_HOTNESS = {"nan": np.nan, "infinite": np.inf, "negative": -1.0}


@pytest.mark.parametrize("value", BAD_HOTNESS.values(), ids=BAD_HOTNESS)
def test_hotness_that_is_none_is_refused_where_it_enters(value: float) -> None:
    model = patched()
    before = model.dynaexq.hotness()
    hotness = np.ones((2, 8))
    hotness[1, 3] = value
    with pytest.raises(dynaexq.SettingsError, match="finite and not negative"):
        model.dynaexq.warm_start(hotness)
    np.testing.assert_array_equal(model.dynaexq.hotness(), before)


def test_rows_that_are_not_finite_leave_hotness_finite() -> None:
    model = patched()
    with torch.no_grad():
        layer = tiny.sparse_blocks(model)[0].experts
        layer(torch.full((3, 64), torch.nan), torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), torch.nan))
    run(model, 2)
    assert np.isfinite(model.dynaexq.hotness()).all()


def test_a_tick_that_goes_on_failing_is_tried_ever_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = patched(auto_pause=False)
    device, tried = model.dynaexq.devices[0], []

    def fail(arrival: object) -> None:
        tried.append(device.steps.total)
        device.steps.take()
        raise RuntimeError("again")

    monkeypatch.setattr(device, "_tick", fail)
    for _ in range(260):
        tiny.logits(model, tiny.prompt(1, 1))
    gaps = np.diff(tried)
    np.testing.assert_array_equal(gaps[:7], [2, 4, 8, 16, 32, 64, 64])
    assert model.dynaexq.health().failed_ticks == len(tried)


def test_what_is_well_has_failed_at_nothing() -> None:
    health = patched().dynaexq.health()
    assert (health.state, health.failed_copies, health.suspect_experts, health.failed_ticks) == ("ok", 0, 0, 0)
    assert Health("ok", 0.0, "") == Health("ok", 0.0, "", 0, 0, 0)


def test_freezing_publishes_what_was_on_its_way() -> None:
    model = patched(auto_pause=False, hysteresis=0.0)
    runtime, pipeline = model.dynaexq, model.dynaexq.devices[0].pipeline
    pipeline.copier = ManualCopier()
    tiny.steer(model, EVENING)
    run(model, 2)
    assert pipeline.num_in_flight
    runtime.freeze()
    assert not pipeline.num_in_flight
