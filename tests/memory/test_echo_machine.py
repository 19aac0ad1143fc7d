"""Thousands of random steps of a host and a device that share words, with graphs replayed while precision moves.

The device is a queue of small pieces of work that the machine runs one by one, so that host and device meet in every
state between them: a fetch reads its words in any order while the host stores, readers take a snapshot and read on for
a while, and what a report writes is seen late. Readers hold the bytes they were promised against the bytes they find.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from dynaexq.memory import DeviceMemory, ManualCopier, RamStore, SwapPipeline
from dynaexq.memory.graph_sync import EpochFence
from dynaexq.types import EPOCH, FETCHED, FOUND, SEEN, STEPS, WORDS_AHEAD, Transition, split_entry

LAYERS, EXPERTS, SLOT_NBYTES, KIND = 2, 4, 256, 8
CPU = torch.device("cpu")
SCORE = np.arange(LAYERS * EXPERTS, dtype=float).reshape(LAYERS, EXPERTS)
BYTES = (torch.arange(LAYERS * EXPERTS * SLOT_NBYTES) % 223).to(torch.uint8).view(LAYERS, EXPERTS, SLOT_NBYTES)

Work = Callable[[], None]
positions = st.integers(0, 1000)
RAN: Counter[str] = Counter()
seldom = st.integers(0, 9).map(lambda drawn: drawn == 5)


class Device:
    """Work in order, and stores to host memory on their way."""

    def __init__(self) -> None:
        self.queue: deque[Work] = deque()
        self.stores: deque[Work] = deque()
        self.capture: list[Work] | None = None

    def submit(self, *work: Work) -> None:
        """Queue it; or, while a graph is captured, write it down."""
        (self.queue if self.capture is None else self.capture).extend(work)

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.queue.popleft()()

    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.stores))):
            self.stores.popleft()()

    def synchronize(self) -> None:
        self.run(len(self.queue))
        self.deliver(len(self.stores))


class PiecemealExchange:
    """What `PlainExchange` does, a word at a time in any order, and reported late."""

    def __init__(self, device: Device):
        self.device, self.shuffle = device, random.Random(0).shuffle

    def fetch(self, words: Tensor, entries: Tensor) -> None:
        flat = entries.view(-1)

        def copy_entry(place: int) -> None:
            flat[place] = words[WORDS_AHEAD + place]

        pieces = [partial(copy_entry, place) for place in range(len(flat))] + [partial(self.take_epoch, words)]
        self.shuffle(pieces)
        self.device.submit(*pieces)

    def take_epoch(self, words: Tensor) -> None:
        words[FETCHED] = words[FOUND]
        words[FOUND] = words[EPOCH]

    def report(self, words: Tensor, sums: Tensor, steps: int) -> None:
        def work() -> None:
            fetched = words[FETCHED].clone()
            self.device.stores.append(partial(arrive, fetched))

        def arrive(fetched: Tensor) -> None:
            words[SEEN] = fetched
            words[STEPS] += steps

        self.device.submit(work)


class SimulatedMemory(DeviceMemory):
    """Device memory whose device is the simulated one."""

    def __init__(self, num_slots: int, device: Device, exchange: PiecemealExchange):
        self.simulated = device
        super().__init__(LAYERS, EXPERTS, 256, SLOT_NBYTES, num_slots, CPU, exchange=exchange)

    def _synchronizer(self, *_: object) -> Callable[[], None]:
        return self.simulated.synchronize


class EchoMachine(RuleBasedStateMachine):
    @initialize(num_slots=st.sampled_from([2, 4]))
    def begin(self, num_slots: int) -> None:
        self.device = Device()
        self.memory = SimulatedMemory(num_slots, self.device, PiecemealExchange(self.device))
        self.copier = ManualCopier()
        store = RamStore(LAYERS * EXPERTS, SLOT_NBYTES)
        store.write(0, BYTES.flatten(0, 1))
        self.pipeline = SwapPipeline(self.memory.table, self.memory.pool, store, self.copier, KIND)
        self.graphs: list[list[Work]] = []
        self.readers: dict[int, dict[tuple[int, int], int]] = {}
        self.readers_begun = self.forwards = 0
        for expert in range(num_slots):
            self._move((0, expert), promote=True)
        self.pipeline.drain()
        self.capture()

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        for _ in range(2):  # whatever was done, two more forwards free every retired slot
            self._forward()
        self.device.synchronize()
        self.memory.pool.reclaim()
        assert self.memory.pool.num_available == len(self.memory.pool._free)
        assert self.memory.reported_steps == self.forwards
        self.pipeline.close()
        self.what_is_published_is_complete()

    # The host: moves, and copies that arrive by themselves.

    @rule(position=positions)
    def demote(self, position: int) -> None:
        published = list(zip(*self.memory.table.kinds().nonzero(), strict=True))
        if published:
            self._move(published[position % len(published)], promote=False)

    @rule(position=positions)
    def promote(self, position: int) -> None:
        base_only = list(zip(*(~self.pipeline.upgraded).nonzero(), strict=True))
        self._move(base_only[position % len(base_only)], promote=True)

    @precondition(lambda self: self.copier.pending)
    @rule(position=positions, well=st.sampled_from([True, True, True, False]))
    def end_a_copy(self, position: int, well: bool) -> None:
        (self.copier.complete if well else self.copier.fail)(position % len(self.copier.pending))

    @rule()
    def settle(self) -> None:
        self.pipeline.settle()

    @rule(now=seldom)
    def drain(self, now: bool) -> None:
        if now:
            self.pipeline.drain()

    @rule(num_slots=st.integers(0, 5), now=seldom)
    def resize(self, num_slots: int, now: bool) -> None:
        if not now:
            return
        self.pipeline.resize(num_slots, SCORE)
        RAN["resizes"] += 1

    # What the program launches. Any of it may wait in the queue for long.

    @rule()
    def run_eagerly(self) -> None:
        self._forward()

    @precondition(lambda self: len(self.graphs) < 3)
    @rule()
    def capture(self) -> None:
        self.device.capture = []
        self._forward()
        self.forwards -= 1
        self.graphs.append(self.device.capture)
        self.device.capture = None

    @precondition(lambda self: self.graphs and len(self.device.queue) < 100)
    @rule(position=positions)
    def replay(self, position: int) -> None:
        self.device.submit(*self.graphs[position % len(self.graphs)])
        self.forwards += 1
        RAN["replays"] += 1

    @rule(layer=st.integers(0, LAYERS - 1))
    def read_without_fetching(self, layer: int) -> None:
        self._read(layer)

    # The device goes on.

    @precondition(lambda self: self.device.queue)
    @rule(count=st.integers(1, 30))
    def run(self, count: int) -> None:
        self.device.run(count)

    @precondition(lambda self: self.device.stores)
    @rule(count=st.integers(1, 2))
    def deliver(self, count: int) -> None:
        self.device.deliver(count)

    def _move(self, key: tuple[int, int], promote: bool) -> None:
        RAN["moves"] += self.pipeline.submit(Transition(*key, promote))

    def _forward(self) -> None:
        self.forwards += 1
        for layer in range(LAYERS):
            self.memory.layer_begins(layer)
            self._read(layer)
            self.memory.layer_ends(layer, observed=True)

    def _read(self, layer: int) -> None:
        current: list[int] = []

        def look() -> None:
            self.readers_begun += 1
            current.append(self.readers_begun)
            entries = [split_entry(int(entry)) for entry in self.memory.table.row(layer)]
            found = {(layer, expert): address for expert, (address, kind) in enumerate(entries) if kind}
            self.readers[self.readers_begun] = found
            RAN["reads of an upgrade"] += len(found)

        def finish() -> None:
            del self.readers[current.pop()]

        self.device.submit(look, lambda: None, finish)

    @invariant()
    def readers_find_what_they_were_promised(self) -> None:
        for found in getattr(self, "readers", {}).values():
            for key, address in found.items():
                assert torch.equal(self.memory.pool.at(address), BYTES[key])

    @invariant()
    def what_is_published_is_complete(self) -> None:
        if not hasattr(self, "memory"):
            return
        for key in zip(*self.memory.table.kinds().nonzero(), strict=True):
            address, _ = split_entry(int(self.memory.table._published[key]))
            assert torch.equal(self.memory.pool.at(address), BYTES[key])

    @invariant()
    def the_device_knows_no_memory_that_is_gone(self) -> None:
        if hasattr(self, "memory"):
            for entry in self.memory.table.entries[self.memory.table.entries > 0].tolist():
                self.memory.pool.at(split_entry(entry)[0])  # a KeyError says that it is


def test_no_slot_is_written_while_anyone_may_read_it() -> None:
    RAN.clear()
    run_state_machine_as_test(EchoMachine, settings=settings(max_examples=400, stateful_step_count=50))
    assert min(RAN.values()) > 100, RAN


def test_an_epoch_found_in_the_middle_of_a_fetch_is_not_echoed_by_that_forward() -> None:
    """The table was read before the epoch, and who reads without fetching finds that table for a while."""
    device = Device()
    exchange = PiecemealExchange(device)
    exchange.shuffle = lambda pieces: None  # the epoch last
    memory = SimulatedMemory(1, device, exchange)
    slot = memory.pool.allocate()
    assert slot is not None
    memory.table.publish(0, 0, slot.address, KIND)

    def forward(before_the_epoch: Work) -> None:
        memory.layer_begins(0)
        device.run(LAYERS * EXPERTS)
        before_the_epoch()
        memory.layer_ends(LAYERS - 1, observed=True)
        device.synchronize()

    def demote() -> None:
        memory.table.unpublish(0, 0)
        memory.pool.retire(slot)

    forward(demote)
    assert int(memory.table.row(0)[0]) == slot.address | KIND, "so far a backward pass would find the slot"
    assert memory.pool.allocate() is None
    forward(lambda: None)
    assert not memory.table.row(0).any()
    assert memory.pool.allocate() is slot


def passes_always(fence: EpochFence, ticket: int) -> bool:
    return True


def passes_after_the_forward_that_ran(fence: EpochFence, ticket: int) -> bool:
    """One more forward has ended than when this was first asked."""
    asked = fence.__dict__.setdefault("asked", {})
    return fence._words.steps > asked.setdefault(ticket, fence._words.steps)


@pytest.mark.parametrize("passed", [passes_always, passes_after_the_forward_that_ran])
def test_the_machine_finds_weaker_rules_out(monkeypatch: pytest.MonkeyPatch, passed: Callable) -> None:
    monkeypatch.setattr(EpochFence, "passed", passed)
    with pytest.raises((AssertionError, KeyError)):  # wrong bytes, or bytes that are gone
        run_state_machine_as_test(
            EchoMachine, settings=settings(max_examples=500, stateful_step_count=50, phases=[Phase.generate])
        )
