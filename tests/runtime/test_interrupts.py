"""Control that is cut short at any line leaves the state before or the state after, and goes on from there.

Every operation is interrupted at every line of dynaexq that it executes. What must hold afterwards is said once, in
`assert_sound`, and then the model has to follow its traffic again.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interrupts import interrupted_at, interrupts
from shifting import EVENING, MORNING, assert_answers_as_published, patched, run, upgraded
from torch import nn

from dynaexq.errors import ClosedError, ReentryError
from dynaexq.memory import RamStore
from dynaexq.runtime.device_runtime import DeviceRuntime

TIERS = ("int2", "int4")


def assert_sound(model: nn.Module, where: str, budgets: set[int]) -> None:
    """No slot is lost, no reader left, nothing held, nothing above the ceiling; the books agree with each other."""
    runtime = model.dynaexq
    device: DeviceRuntime = runtime.devices[0]
    pipeline, pool = device.pipeline, device.memory.pool
    memory = runtime.memory()
    assert not device._ticking.locked(), where
    assert not device.memory.fence._older(1 << 62), where
    assert runtime.plan.budget in budgets, where
    assert memory["total"] + device.reserved <= runtime.plan.budget, where
    assert memory["total"] == sum(memory[part] for part in ("dense", "base", "upgrade", "staging", "workspace")), where
    assert pool.num_slots == runtime.plan.num_slots == len(pool._owned) + pool.num_available, where
    flights = {key: flight.slot for key, flight in pipeline._in_flight.items()}
    assert not flights.keys() & pipeline._published.keys(), where
    assert pool._owned == {slot.address for slot in (*pipeline._published.values(), *flights.values())}, where
    published = np.zeros(pipeline.upgraded.shape, dtype=bool)
    for key, slot in pipeline._published.items():
        published[key] = True
        assert int(device.memory.table.entries[key]) == slot.address | pipeline.kind, where
    np.testing.assert_array_equal(device.memory.table.kinds() > 0, published, where)
    for key in flights:
        published[key] = True
    np.testing.assert_array_equal(pipeline.upgraded, published, where)
    counts = pipeline.counts
    assert counts.promotions - counts.demotions == len(pipeline._published), where
    assert counts.failed == 0, where


class Bench:
    """A model that is interrupted again and again, and is turned from one traffic to the other in between."""

    def __init__(self, **options: Any):
        self.model = patched(TIERS, auto_pause=False, hysteresis=0.0, half_life=2, **options)
        self.runtime = self.model.dynaexq
        self.high = self.runtime.plan.budget
        self.low = self.high - 2 * self.runtime.plan.upgrade.nbytes
        self._turn = 0

    def turn(self) -> None:
        """Let other experts be wanted than are upgraded, and have room for four of them."""
        self.runtime.set_budget(self.high)
        self.runtime.thaw()
        run_elsewhere(self.model, [MORNING, EVENING][self._turn % 2])
        self._turn += 1
        tiny.steer(self.model, [MORNING, EVENING][self._turn % 2])

    def follows(self) -> bool:
        """Whether it still finds the experts of its traffic."""
        self.runtime.devices[0].make_room(0)
        self.runtime.set_budget(self.high)
        self.runtime.thaw()
        wanted = [sorted(row[0]) for row in [MORNING, EVENING][self._turn % 2]]
        for _ in range(12):
            tiny.logits(self.model)
            if upgraded(self.model) == wanted:
                return True
        return False


def run_elsewhere(model: nn.Module, routes: Any) -> None:
    tiny.steer(model, routes)
    run(model, 4)


OPERATIONS: dict[str, Callable[[Bench], Any]] = {
    "a forward that ticks": lambda bench: tiny.logits(bench.model),
    "tick": lambda bench: bench.runtime.tick(),
    "drain": lambda bench: bench.runtime.drain(),
    "freeze": lambda bench: bench.runtime.freeze(),
    "thaw": lambda bench: bench.runtime.thaw(),
    "a smaller budget": lambda bench: bench.runtime.set_budget(bench.low),
    "a larger budget": lambda bench: bench.runtime.set_budget(bench.high),
    "less room": lambda bench: bench.runtime.devices[0].make_room(0),
    "more room": lambda bench: bench.runtime.devices[0].make_room(2 * bench.runtime.plan.upgrade.nbytes),
    "a warm start": lambda bench: bench.runtime.warm_start(np.random.default_rng(bench._turn).random((2, 8))),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_at_any_line_leaves_the_state_before_or_after(operation: str) -> None:
    bench = Bench()

    def prepare() -> None:
        bench.turn()
        if operation == "a larger budget":
            bench.runtime.set_budget(bench.low)
        if operation == "less room":
            bench.runtime.devices[0].make_room(2 * bench.runtime.plan.upgrade.nbytes)
        if operation == "more room":
            bench.runtime.devices[0].make_room(0)
        if operation == "tick":
            with torch.no_grad():
                bench.model(tiny.prompt())

    lines = 0
    for where in interrupts(prepare, lambda: OPERATIONS[operation](bench)):
        assert_sound(bench.model, where, {bench.low, bench.high})
        if lines % 10 == 0:
            assert bench.follows(), where
        lines += 1
    assert lines >= (3 if operation == "thaw" else 8), lines
    original = tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64)
    tiny.steer(bench.model, None)
    assert_answers_as_published(bench.model, original)


def test_an_interrupt_at_any_line_of_close_is_finished_by_the_next_close() -> None:
    number, where = 0, ""
    while where is not None:
        model = patched(TIERS)
        runtime = model.dynaexq
        where = interrupted_at(number, runtime.close)
        if not runtime.devices[0].closed:
            assert_sound(model, str(where), {runtime.plan.budget})
            run(model, 2)
        runtime.close()
        assert runtime.stats()["host_bytes"] == 0, where
        with pytest.raises(ClosedError):
            runtime.tick()
        tiny.logits(model)
        number += 1
    assert number > 10


@pytest.mark.parametrize("larger", [True, False])
def test_where_memory_runs_out_the_old_budget_holds(larger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    start, goal = (bench.low, bench.high) if larger else (bench.high, bench.low)
    bench.runtime.set_budget(start)

    def refuse(*_: object) -> None:
        raise MemoryError("by the test")

    with monkeypatch.context() as short:
        short.setattr(f"dynaexq.memory.slab_pool.SlabPool.{'grow' if larger else 'drop'}", refuse)
        with pytest.raises(MemoryError):
            bench.runtime.set_budget(goal)
    assert bench.runtime.plan.budget == start
    assert_sound(bench.model, "grow", {start})
    bench.turn()
    assert bench.follows()


def test_a_copy_that_is_interrupted_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    read = RamStore.read_into

    def interrupted(self: RamStore, index: int, out: torch.Tensor) -> None:
        out.fill_(0xEE)
        raise KeyboardInterrupt

    bench.turn()
    monkeypatch.setattr(RamStore, "read_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(bench.model, 12)
    assert_sound(bench.model, "read", {bench.high})
    monkeypatch.setattr(RamStore, "read_into", read)
    assert bench.follows()


def calls_from_within(runtime: Any) -> dict[str, Callable[[], Any]]:
    return {
        "set_budget": lambda: runtime.set_budget(runtime.plan.budget),
        "freeze": runtime.freeze,
        "drain": runtime.drain,
        "warm_start": lambda: runtime.warm_start(runtime.hotness()),
        "close": runtime.close,
    }


def test_a_policy_may_look_at_everything_and_is_told_what_it_may_not_do() -> None:
    said: dict[str, Any] = {}

    def policy(score: np.ndarray, held: np.ndarray, slots: int) -> np.ndarray:
        runtime = model.dynaexq
        said["looks"] = [runtime.memory(), runtime.stats(), runtime.report(), runtime.health(), runtime.tiers()]
        said["tick"] = runtime.tick()
        tiny.logits(model)
        for name, call in calls_from_within(runtime).items():
            with pytest.raises(ReentryError, match="asked for from within itself"):
                call()
            said[name] = True
        return held

    model = patched(TIERS, policy=policy)
    tiny.logits(model)
    assert said.pop("looks")
    assert said == {"tick": False} | dict.fromkeys(calls_from_within(model.dynaexq), True)
    assert model.dynaexq.health().state == "ok"
    assert_sound(model, "policy", {model.dynaexq.plan.budget})


@pytest.mark.parametrize("name", ["set_budget", "freeze", "drain", "warm_start", "tick", "report", "forward"])
def test_a_signal_handler_in_the_middle_of_anything_is_answered(name: str) -> None:
    bench = Bench()
    calls = calls_from_within(bench.runtime)
    calls |= {"tick": bench.runtime.tick, "report": bench.runtime.report, "forward": lambda: tiny.logits(bench.model)}
    answers = []

    def handler(*_: object) -> None:
        try:
            answers.append(calls[name]())
        except ReentryError as error:
            answers.append(error)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(60):
            signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.0001 * (i % 20))
            bench.turn()
            run(bench.model, 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(answers) > 30
    bench.runtime.thaw()
    assert bench.follows()
    assert_sound(bench.model, name, {bench.high})


def test_a_child_of_a_process_whose_threads_generate_works() -> None:
    model = patched(TIERS)
    runtime, stop = model.dynaexq, threading.Event()
    low = runtime.plan.budget - 2 * runtime.plan.upgrade.nbytes

    def generate() -> None:
        while not stop.is_set():
            tiny.logits(model)

    threads = [threading.Thread(target=generate) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                runtime.set_budget(low)
                tiny.logits(model)
                runtime.close()
                os._exit(0 if runtime.memory()["total"] <= low else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert runtime.tick() is not None


def test_where_the_old_budget_cannot_be_had_back_the_plan_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.turn()
    device = bench.runtime.devices[0]

    def no_memory(*_: object) -> None:
        raise MemoryError

    bench.runtime.set_budget(bench.low)
    monkeypatch.setattr(device.memory.pool, "grow", no_memory)
    device._agreed = replace(device._agreed, num_slots=device.pipeline.num_slots + 2)
    device._mend()
    assert bench.runtime.plan.num_slots == device.pipeline.num_slots
    monkeypatch.undo()
    assert bench.follows()
