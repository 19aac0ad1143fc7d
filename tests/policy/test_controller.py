"""One tick, told once: whatever holds the slots, the same windows begin the same moves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaexq.memory import DeviceMemory, EagerCopier, RamStore, SwapPipeline
from dynaexq.policy.controller import ControlLoop, Slots, Window
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.settings import Settings
from dynaexq.simulator.replay import ImaginedSlots, Machine

SHAPE = LAYERS, EXPERTS = 3, 6
SLOT_NBYTES = 256


def best_by_score(score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
    """A policy of a user's own."""
    wanted = np.zeros(score.size, dtype=bool)
    wanted[np.argsort(-score, axis=None)[:slots]] = True
    return wanted.reshape(score.shape)


OPTIONS = (
    {"policy": "topn", "auto_pause": False, "half_life": 4.0},
    {"policy": "topn", "auto_pause": True, "half_life": 4.0},
    {"policy": "topn", "auto_pause": False, "allocation": "per_layer", "alpha": 0.5},
    {"policy": "threshold", "tau_h": 0.2, "tau_c": 0.1},
    {"policy": "frozen"},
    {"policy": best_by_score},
)


def pipeline(num_slots: int) -> SwapPipeline:
    """A real pipeline on the CPU: real slots, copied to at once."""
    memory = DeviceMemory(LAYERS, EXPERTS, 256, SLOT_NBYTES, num_slots, torch.device("cpu"))
    store = RamStore(LAYERS * EXPERTS, SLOT_NBYTES)
    return SwapPipeline(memory.table, memory.pool, store, EagerCopier(), kind=4)


def loop(options: dict, seed: int) -> ControlLoop:
    gain = np.random.default_rng(seed).random(SHAPE) + 0.1
    return ControlLoop(SHAPE, gain, CopyRateLimiter(None, SLOT_NBYTES), Settings(**options))


def routed(seed: int, count: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Mass, tokens and steps of several windows, some of them empty."""
    rng = np.random.default_rng(seed)
    return [
        (rng.random(SHAPE) ** 4 * tokens, np.full(LAYERS, tokens), int(rng.integers(1, 4)))
        for tokens in rng.integers(0, 9, count)
    ]


@settings(max_examples=60)
@given(
    options=st.sampled_from(OPTIONS),
    num_slots=st.integers(0, LAYERS * EXPERTS),
    seed=st.integers(0, 999),
    frozen=st.sets(st.integers(0, 11)),
)
def test_a_pipeline_and_an_imagined_one_begin_the_same_moves(options, num_slots, seed, frozen):
    real, imagined = pipeline(num_slots), ImaginedSlots(Machine(num_slots, SLOT_NBYTES, np.inf, 1.0), SHAPE)
    loops = loop(options, seed), loop(options, seed)
    slots: tuple[Slots, Slots] = (real, imagined)
    for control, held in zip(loops, slots, strict=True):
        control.fill(held)
        held.drain()
    for number, (mass, tokens, steps) in enumerate(routed(seed, 12)):
        imagined.now += 1.0
        upgraded = real.table.kinds() > 0
        np.testing.assert_array_equal(upgraded, imagined.published)
        window = Window(mass, tokens, steps, top_k=2, upgraded=upgraded)
        begun = [control.step(window, held, number in frozen) for control, held in zip(loops, slots, strict=True)]
        assert begun[0] == begun[1]
        assert real.num_free == imagined.num_free
        np.testing.assert_array_equal(real.upgraded, imagined.upgraded)
    assert str(loops[0].verdict(real.upgraded)) == str(loops[1].verdict(imagined.upgraded))


def test_a_tick_without_slots_observes_and_moves_nothing():
    control, held = loop(OPTIONS[0], 0), pipeline(0)
    before = control.tracker.hotness.copy()
    window = Window(np.eye(LAYERS, EXPERTS), np.full(LAYERS, 5), 1, 2, np.zeros(SHAPE, dtype=bool))
    assert control.step(window, held) == []
    assert (control.tracker.hotness != before).any()


def test_where_copies_fail_no_expert_loses_its_upgrade_to_another():
    control, held = loop(OPTIONS[0], 3), pipeline(4)
    control.fill(held)
    held.drain()
    kept = held.upgraded.copy()
    windows = [Window(*parts, 2, kept) for parts in routed(5, 8)]
    held.retries.failed((0, int(np.flatnonzero(~kept[0])[0])), OSError("by the test"))
    held.retries._probe_due = held.retries.now + 100
    assert not any(control.step(window, held) for window in windows)
    np.testing.assert_array_equal(held.upgraded, kept)
    held.retries.arrived((0, 0))
    assert any(control.step(window, held) for window in windows), "else this test shows nothing"


def test_every_step_is_a_tick_for_what_waits_to_be_tried_again():
    control, held = loop(OPTIONS[0], 0), pipeline(2)
    for mass, tokens, steps in routed(1, 3):
        control.step(Window(mass, tokens, steps, 2, held.upgraded), held)
    assert held.retries.now == 3


def test_a_free_slot_goes_to_no_expert_that_is_barred_however_hot():
    control, held = loop(OPTIONS[0], 0), pipeline(LAYERS * EXPERTS)
    held.retries.failed((1, 2), OSError("by the test"))
    held.retries.arrived((0, 0))  # the store is well, this one expert is not
    assert held.barred[1, 2]
    moves = control.controller.fill(np.ones(SHAPE), held)
    assert len(moves) == LAYERS * EXPERTS - 1
    assert (1, 2) not in {(move.layer, move.expert) for move in moves}


def test_the_coverage_of_a_window_without_mass_is_none():
    empty = Window(np.zeros(SHAPE), np.zeros(LAYERS, dtype=int), 0, 1, np.ones(SHAPE, dtype=bool))
    assert empty.coverage == 0.0


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (48, 128)])
def test_what_the_table_and_the_counter_take_is_known_beforehand(shape: tuple[int, int]) -> None:
    memory = DeviceMemory(*shape, 256, SLOT_NBYTES, 0, torch.device("cpu"))
    assert memory.parts()["workspace"] == DeviceMemory.workspace_bytes(*shape)


def test_a_slot_is_given_away_once_its_last_reader_has_ended_and_not_a_tick_later():
    options = {"policy": "topn", "auto_pause": False, "hysteresis": 0.0, "alpha": 0.0}
    slots, control = pipeline(1), loop(options, seed=0)

    def see(expert: int) -> None:
        mass = np.zeros(SHAPE)
        mass[0, expert] = 1e6
        control.step(Window(mass, np.full(LAYERS, 1000), 1, 1, slots.upgraded), slots)

    see(0)
    assert slots.upgraded[0, 0]
    with slots.pool.fence.reading():
        for _ in range(3):
            see(1)
        assert slots.upgraded.sum() == 1, "promised once"
        assert not slots.table.kinds().any(), "the slot is still being read"
    slots.settle()
    assert slots.table.kinds()[0, 1]
