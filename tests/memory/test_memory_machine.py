"""Ten thousand random steps through the memory room, each compared with a model made of sets and dicts.

The machine decides by hand when copies arrive or fail and when readers begin and finish. The model keeps every slot
in one place and says which moves may begin, which slots may be handed out and whom a shrinking pool must wait for.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dynaexq.memory import ExpertTable, HostStore, ManualCopier, ManualFence, RamStore, SlabPool, SwapPipeline
from dynaexq.memory.copy_engine import Copy
from dynaexq.memory.swap_pipeline import MoveCounts
from dynaexq.types import Transition, split_entry

LAYERS, EXPERTS, SLOT_NBYTES, KIND = 2, 8, 256, 8
CPU = torch.device("cpu")
SCORE = np.arange(LAYERS * EXPERTS, dtype=float).reshape(LAYERS, EXPERTS)
# [layer, expert, byte]: every expert's bytes are its own, and none are those that fill memory not yet written
BYTES = (torch.arange(LAYERS * EXPERTS * SLOT_NBYTES) % 223).to(torch.uint8).view(LAYERS, EXPERTS, SLOT_NBYTES)

Key = tuple[int, int]
keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
positions = st.integers(0, LAYERS * EXPERTS - 1)

STEPS: Counter[str] = Counter()


@dataclass
class Model:
    """What must be true. Slots are addresses, readers are the tickets the fence gave them."""

    free: set[int] = field(default_factory=set)
    retired: dict[int, set[int]] = field(default_factory=dict)  # slot -> readers that may still read it
    in_flight: dict[Key, int] = field(default_factory=dict)
    published: dict[Key, int] = field(default_factory=dict)
    waiting: list[Key] = field(default_factory=list)  # promotions that retired slots are meant for, in their order
    landed: dict[Key, bool] = field(default_factory=dict)  # copies in flight that have ended -> whether well
    readers: dict[int, dict[Key, int]] = field(default_factory=dict)  # reader -> the slots it found in its layer
    counts: MoveCounts = field(default_factory=MoveCounts)

    def slots(self) -> list[int]:
        return [*self.free, *self.retired, *self.in_flight.values(), *self.published.values()]

    def base_only(self) -> list[Key]:
        above = {*self.in_flight, *self.published, *self.waiting}
        return [key for key in np.ndindex(LAYERS, EXPERTS) if key not in above]

    def num_unclaimed(self) -> int:
        return len(self.free) + len(self.retired) - len(self.waiting)

    def begin(self, copies: list[tuple[Key, int]]) -> None:
        """Copies that were begun: those first in line, as many as there were free slots."""
        assert [key for key, _ in copies] == self.waiting[: len(self.free)]
        del self.waiting[: len(copies)]
        for key, slot in copies:
            self.free.remove(slot)  # a KeyError says that the pool gave away what is not free
            self.in_flight[key] = slot

    def settle(self) -> None:
        for key, arrived in self.landed.items():
            slot = self.in_flight.pop(key)
            if arrived:
                self.published[key] = slot
                self.counts.promotions += 1
                self.counts.bytes_copied += SLOT_NBYTES
            else:
                self.free.add(slot)
                self.counts.failed += 1
        self.landed.clear()

    def drain(self) -> None:
        self.landed = dict.fromkeys(self.in_flight, True) | self.landed
        self.settle()

    def demote(self, key: Key) -> None:
        self.retired[self.published.pop(key)] = set(self.readers)
        self.counts.demotions += 1
        self._reclaim()

    def finish(self, reader: int) -> None:
        del self.readers[reader]
        for readers in self.retired.values():
            readers.discard(reader)
        self._reclaim()

    def _reclaim(self) -> None:
        unread = {slot for slot, readers in self.retired.items() if not readers}
        self.free |= unread
        for slot in unread:
            del self.retired[slot]


class Copier(ManualCopier):
    """Notes which copies were begun, and where to."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[tuple[Key, int]] = []

    def start(self, store: HostStore, index: int, out: torch.Tensor) -> Copy:
        self._started.append((divmod(index, EXPERTS), out.data_ptr()))
        return super().start(store, index, out)

    def take_started(self) -> list[tuple[Key, int]]:
        """Those since it was asked last."""
        started, self._started = self._started, []
        return started


def pick(items: list[Any], position: int) -> Any:
    return items[position % len(items)]


def step(**drawn: st.SearchStrategy) -> Callable:
    """A rule that counts how often it has run."""

    def decorate(method: Callable) -> Callable:
        STEPS[method.__name__] = 0

        @rule(**drawn)
        @functools.wraps(method)
        def counted(self: "MemoryMachine", **values: object) -> None:
            method(self, **values)
            STEPS[method.__name__] += 1

        return counted

    return decorate


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.fence, self.copier = ManualFence(), Copier()
        self.table = ExpertTable(LAYERS, EXPERTS, CPU)
        self.pool = SlabPool(SLOT_NBYTES, CPU, self.fence)
        store = RamStore(LAYERS * EXPERTS, SLOT_NBYTES)
        store.write(0, BYTES.flatten(0, 1))
        self.pipeline = SwapPipeline(self.table, self.pool, store, self.copier, KIND)

    @initialize(num_slots=st.sampled_from([3, LAYERS * EXPERTS]))  # scarce, or one for every expert
    def begin(self, num_slots: int) -> None:
        self._grow(num_slots)

    @precondition(lambda self: self.model.base_only())
    @step(position=positions)
    def promote(self, position: int) -> None:
        self._submit(pick(self.model.base_only(), position), promote=True)

    @precondition(lambda self: self.model.published)
    @step(position=positions)
    def demote(self, position: int) -> None:
        self._submit(pick(sorted(self.model.published), position), promote=False)

    @step(key=keys, promote=st.booleans())
    def ask_for_anything(self, key: Key, promote: bool) -> None:
        self._submit(key, promote)

    @precondition(lambda self: self.copier.pending)
    @step(position=positions)
    def complete(self, position: int) -> None:
        position %= len(self.copier.pending)
        self.model.landed[self._key_of(position)] = True
        self.copier.complete(position)

    @precondition(lambda self: self.copier.pending)
    @step(position=positions)
    def fail(self, position: int) -> None:
        position %= len(self.copier.pending)
        self.model.landed[self._key_of(position)] = False
        self.copier.fail(position)

    @precondition(lambda self: self.model.landed or self.model.waiting)
    @step()
    def settle(self) -> None:
        self.pipeline.settle()
        self.model.begin(self.copier.take_started())
        self.model.settle()

    @precondition(lambda self: len(self.copier.pending) > 2)
    @step()
    def drain(self) -> None:
        if self.model.waiting:
            self._finish_readers_of(set(self.model.retired))
        self.pipeline.drain()
        self.model.begin(self.copier.take_started())
        self.model.drain()

    @precondition(lambda self: len(self.model.readers) < 4)
    @step(layer=st.integers(0, LAYERS - 1))
    def begin_reader(self, layer: int) -> None:
        reader = self.fence.begin()
        entries = [split_entry(int(entry)) for entry in self.table.row(layer)]
        self.model.readers[reader] = {(layer, e): address for e, (address, kind) in enumerate(entries) if kind}

    @precondition(lambda self: self.model.readers)
    @step(position=positions)
    def finish_reader(self, position: int) -> None:
        reader = pick(sorted(self.model.readers), position)
        self.fence.finish(reader)
        self.model.finish(reader)

    @precondition(lambda self: self.pool.num_slots < LAYERS * EXPERTS)  # a slab has at most a slot an expert
    @step(count=st.integers(1, 6))
    def grow(self, count: int) -> None:
        self._grow(min(count, LAYERS * EXPERTS - self.pool.num_slots))

    @precondition(lambda self: self.model.published)
    @step(count=st.integers(1, 6))
    def shrink(self, count: int) -> None:
        num_slots = max(0, self.pool.num_slots - count)
        model, addresses = self.model, self.pool.surplus(num_slots, self.pipeline.worth(SCORE))
        self.pipeline.vacate(addresses)
        model.waiting.clear()
        model.drain()
        for key in [key for key, slot in model.published.items() if slot in addresses]:
            model.demote(key)
        self.readers_find_what_they_were_promised()  # those the pool now waits for finish inside `drop`
        self.pool.drop(addresses)
        self._finish_readers_of(addresses & model.retired.keys())
        assert addresses <= model.free
        model.free -= addresses
        assert self.pool.num_slots <= num_slots

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        model, slots = self.model, self.model.slots()
        assert len(slots) == len(set(slots)) == self.pool.num_slots
        assert set(slots) == self._addresses()
        assert self.pool.num_available == len(model.free) + len(model.retired)
        assert self.pool.nbytes == self.pool.num_slots * SLOT_NBYTES

    @invariant()
    def what_is_published_is_complete(self) -> None:
        expected = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        for key, address in self.model.published.items():
            assert address % 256 == 0
            assert torch.equal(self.pool.at(address), BYTES[key])
            expected[key] = address | KIND
        np.testing.assert_array_equal(self.table.entries.numpy(), expected)
        np.testing.assert_array_equal([self.table.row(layer).numpy() for layer in range(LAYERS)], expected)

    @invariant()
    def readers_find_what_they_were_promised(self) -> None:
        assert self.fence.readers == set(self.model.readers)
        for found in self.model.readers.values():
            for key, address in found.items():
                assert torch.equal(self.pool.at(address), BYTES[key])

    @invariant()
    def the_pipeline_agrees_with_the_table(self) -> None:
        in_flight = np.zeros((LAYERS, EXPERTS), dtype=bool)
        for key in (*self.model.in_flight, *self.model.waiting):
            in_flight[key] = True
        np.testing.assert_array_equal(self.table.kinds(), KIND * (self.pipeline.upgraded & ~in_flight))
        assert self.pipeline.num_in_flight == len(self.model.in_flight) + len(self.model.waiting)
        assert self.pipeline.num_free == self.model.num_unclaimed()
        assert self.pipeline.counts == self.model.counts

    def teardown(self) -> None:
        """Nothing has leaked: once all is demoted and all readers have gone, each slot can be taken once."""
        self.pipeline.drain()
        self.pipeline.vacate(self._addresses())
        self.fence.readers.clear()
        taken = [slot.address for slot in iter(self.pool.allocate, None)]
        assert sorted(taken) == sorted(self._addresses())

    def _submit(self, key: Key, promote: bool) -> None:
        model = self.model
        possible = model.num_unclaimed() > 0 and key in model.base_only() if promote else key in model.published
        assert self.pipeline.submit(Transition(*key, promote)) == possible
        if not possible:
            model.counts.refused += 1
        elif promote:
            model.waiting.append(key)
            model.begin(self.copier.take_started())
        else:
            model.demote(key)

    def _grow(self, count: int) -> None:
        before = self._addresses()
        self.pool.grow(count)
        added = self._addresses() - before
        assert len(added) == count
        self.model.free |= added

    def _finish_readers_of(self, slots: set[int]) -> None:
        """What waits for those slots waits until none of their readers is left."""
        for reader in set().union(*(self.model.retired[slot] for slot in slots)):
            self.model.finish(reader)

    def _addresses(self) -> set[int]:
        return self.pool.surplus(0, {})

    def _key_of(self, position: int) -> Key:
        return divmod(self.copier.pending[position][2], EXPERTS)


def test_ten_thousand_random_steps_keep_every_invariant() -> None:
    run_state_machine_as_test(MemoryMachine, settings=settings(max_examples=250, stateful_step_count=100))
    assert STEPS.total() >= 10_000, STEPS
    assert min(STEPS.values()) >= 50, STEPS
