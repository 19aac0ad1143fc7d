"""One move: copy, publish, retire, reclaim; spread over ticks, never waited for. It decides nothing.

A promotion takes a slot and starts a copy (`submit`); when the bytes have arrived the expert is published (`settle`).
A demotion is published at once, and its slot retires until the last reader has finished; the promotion that is to have
it waits in line. A slot with a copy in flight stays owned until that copy is done. What fails leaves the published
version as it was, is counted, and is tried again later (`retries`).
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from dynaexq.memory.copy_engine import Copier, Copy
from dynaexq.memory.expert_table import ExpertTable
from dynaexq.memory.host_store import HostStore
from dynaexq.memory.pinned import run_outside_capture
from dynaexq.memory.retries import Retries
from dynaexq.memory.slab_pool import SlabPool, Slot
from dynaexq.types import Transition

logger = logging.getLogger(__name__)

Key = tuple[int, int]


@dataclass
class MoveCounts:
    """Moves since the start. A refused move found no slot, or met an expert that was already there or on its way.

    After 26 slots were filled and three experts changed places: 29 promotions, 3 demotions, `bytes_copied` 29 slots.
    """

    promotions: int = 0
    demotions: int = 0
    refused: int = 0
    failed: int = 0
    bytes_copied: int = 0


@dataclass(eq=False)
class Flight:
    """A slot that bytes are on their way to; `copy` is None until the copier has taken the job."""

    slot: Slot
    copy: Copy | None = None


class SwapPipeline:
    """Brings upgrades of one `kind` into `pool` and publishes them in `table`.

    What is published is what the table says, and the rest of the books can be made from it and from what is in flight:
    `mend` does so after a call that was cut short, at whatever line. Each step below is ordered for that.
    """

    def __init__(
        self,
        table: ExpertTable,
        pool: SlabPool,
        store: HostStore,
        copier: Copier,
        kind: int,
    ):
        self.table, self.pool, self.store, self.copier, self.kind = table, pool, store, copier, kind
        self.counts = MoveCounts()
        shape = tuple(table.entries.shape)
        self.upgraded = np.zeros(shape, dtype=bool)
        """Experts published or on their way: what the next decision must take as given."""
        self.retries = Retries(shape)  # type: ignore[arg-type]
        self._published: dict[Key, Slot] = {}
        self._in_flight: dict[Key, Flight] = {}
        self._waiting: deque[Key] = deque()
        """Promotions that slots which are retired now are meant for, the first in line first."""

    @property
    def num_slots(self) -> int:
        """All slots, free or not."""
        return self.pool.num_slots

    @property
    def num_free(self) -> int:
        """Slots that no promotion is meant for: free, or to be free once their last reader has finished."""
        return self.pool.num_available - len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Promotions on their way: copies, and those that wait for a slot."""
        return len(self._in_flight) + len(self._waiting)

    @property
    def barred(self) -> np.ndarray:
        """Experts not to be tried now, as their last copy has failed, bool `[L, E]`."""
        return self.retries.barred

    @property
    def allowance(self) -> int | None:
        """Promotions that may begin now: None for any number, 1 to probe a store that failed, 0 while it rests."""
        allowance = self.retries.allowance
        return 0 if allowance and self.num_in_flight else allowance

    def tick(self) -> None:
        """Time passes for what waits to be tried again."""
        self.retries.tick()

    def reclaim(self) -> None:
        """Free the slots whose last reader has finished. Never waits."""
        self.pool.reclaim()

    def submit(self, move: Transition) -> bool:
        """Begin one move; False, and counted as refused, where it cannot begin now."""
        key = (move.layer, move.expert)
        begun = self._promote(key) if move.promote else self._demote(key)
        self.counts.refused += not begun
        return begun

    def settle(self) -> None:
        """Publish every upgrade whose bytes have arrived, and copy those whose slot has become free. Never waits."""
        self._begin_copies()
        self.copier.flush()
        for key, flight in list(self._in_flight.items()):
            if flight.copy is None or not flight.copy.done:
                continue
            if flight.copy.error is not None:
                self._give_up(key, flight.slot, flight.copy.error)
            else:
                self._publish(key, flight.slot)

    def drain(self) -> None:
        """Wait for everything on its way, for the last readers of slots that it is to have as well, and publish it."""
        if self._waiting:
            self.pool.settle()
            self._begin_copies()
        self.copier.synchronize()
        self.settle()

    def resize(self, num_slots: int, score: np.ndarray) -> None:
        """Bring the slab to `num_slots`; segments whose experts have the least `score [L, E]` are dropped first.

        Waits for copies in flight and for readers of what is dropped. Memory is dropped before any is taken.
        """
        surplus = self.pool.surplus(num_slots, self.worth(score))
        if surplus:
            self.vacate(surplus)
            self.pool.drop(surplus)
        if num_slots > self.pool.num_slots:
            self.pool.grow(num_slots - self.pool.num_slots)

    def worth(self, score: np.ndarray) -> dict[int, float]:
        """Slot address -> score `[L, E]` of the expert published there."""
        return {slot.address: float(score[key]) for key, slot in self._published.items()}

    def vacate(self, addresses: set[int]) -> None:
        """Demote every expert whose upgrade lies at one of `addresses`; waits for copies in flight, not readers.

        Promotions that wait for a slot are given up.
        """
        self._clear_line()
        self.drain()
        for key in [key for key, slot in self._published.items() if slot.address in addresses]:
            self._demote(key)

    def keep(self, wanted: np.ndarray) -> None:
        """Demote every expert but those `wanted [L, E]`; waits for copies in flight and for the last readers."""
        self._clear_line()
        self.drain()
        for key in [key for key in self._published if not wanted[key]]:
            self._demote(key)
        self.pool.settle()

    def mend(self) -> None:
        """Put the books in order after a call that was cut short; what it had not finished counts as not begun."""
        if any(flight.copy is None for flight in self._in_flight.values()):
            self.copier.synchronize()  # it may have taken the job all the same, and then it has now done it
        self.table.mend()
        published = {key: self.pool.slot(address) for key, address in self.table.addresses().items()}
        in_flight = {
            key: flight for key, flight in self._in_flight.items() if flight.copy is not None and key not in published
        }
        self.pool.mend({slot.address for slot in (*published.values(), *(f.slot for f in in_flight.values()))})
        self.counts.promotions = self.counts.demotions + len(published)
        self.counts.bytes_copied = self.counts.promotions * self.pool.slot_nbytes
        self._published, self._in_flight = published, in_flight
        self._clear_line()

    def close(self) -> None:
        """Wait for copies in flight, then close the copier and the store. A second call finishes what one began."""
        self._clear_line()
        self.copier.close()
        self.settle()
        self.store.close()

    def forget(self) -> None:
        """`close` as garbage is collected, when that is allowed: on any thread but the main one, by another thread.

        It may be the copier's own thread, in the middle of a job that closing waits for, or with a lock in its hands.
        """
        if self.pool.device.type == "cuda":
            run_outside_capture(self._close_apart)
        else:
            self._close_apart()

    def _close_apart(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.close()
        else:
            threading.Thread(target=self.close, name="dynaexq-closing", daemon=True).start()

    def _promote(self, key: Key) -> bool:
        if self.upgraded[key] or self.num_free <= 0:
            return False
        self._waiting.append(key)
        self.upgraded[key] = True
        self._begin_copies()
        return True

    def _begin_copies(self) -> None:
        """Begin the first copies in line, as far as there are slots for them."""
        while self._waiting and (slot := self.pool.allocate()) is not None:
            key = self._waiting.popleft()
            flight = self._in_flight[key] = Flight(slot)
            flight.copy = self.copier.start(self.store, key[0] * self.upgraded.shape[1] + key[1], slot.bytes)

    def _clear_line(self) -> None:
        """Give up the promotions that have no slot yet."""
        self._waiting.clear()
        self._count_upgraded()

    def _publish(self, key: Key, slot: Slot) -> None:
        with self.pool.fence.writing():
            self.table.publish(*key, slot.address, self.kind)
        self._published[key] = slot
        self.retries.arrived(key)
        self.counts.promotions += 1
        self.counts.bytes_copied += self.pool.slot_nbytes
        del self._in_flight[key]

    def _demote(self, key: Key) -> bool:
        slot = self._published.get(key)
        if slot is None:
            return False
        with self.pool.fence.writing():
            self.table.unpublish(*key)
        del self._published[key]
        self.pool.retire(slot)
        self.upgraded[key] = False
        self.counts.demotions += 1
        return True

    def _give_up(self, key: Key, slot: Slot, error: Exception) -> None:
        logger.debug("upgrade of expert %d in layer %d not copied, it keeps its base: %s", key[1], key[0], error)
        self.retries.failed(key, error)
        self.counts.failed += 1
        del self._in_flight[key]
        self.pool.release(slot)
        self.upgraded[key] = False

    def _count_upgraded(self) -> None:
        upgraded = np.zeros_like(self.upgraded)
        for key in (*self._published, *self._in_flight):
            upgraded[key] = True
        self.upgraded = upgraded
