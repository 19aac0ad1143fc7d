"""Epoch-based reclamation over a mapped-memory mailbox, so that a CUDA graph captured once follows the host.

Memory is reclaimed by epochs as in Fraser, *Practical lock-freedom* (2004): what was taken out of the table is used
again once every reader has reported a later epoch. The readers here are forwards on a device, eager or replayed, that
never call the host; so they exchange words with it in page-locked memory that both address.

The first layer of every forward *fetches*: it copies the host's table of experts to the device. The last *reports*
what was routed, and of how late a table it was. Both are kernels, so a replay of the graph does what the captured
forward did. The host only loads and stores.

    word        written by   means
    epoch       host         moments at which the host took something out of the table, counted
    found       fetch        the epoch, as the last fetch found it
    fetched     fetch        the epoch, as the fetch before the last had found it: surely older than the device's table
    seen        report       `fetched`, when a forward has ended
    steps       report       forwards that have ended, and were observed
    table       host         `[num_layers, num_experts]`, entries as in `expert_table`
    counts      report       `[num_layers, num_experts + 2]`, the sums of `routing_counter`

`HostMailbox` holds the words, `PlainExchange` says what fetch and report do, `EpochFence` concludes when a slot may be
used again. What an entry means is not known here.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dynaexq.memory.fences import Fence
from dynaexq.memory.pinned import Addressable, on_device, run_outside_capture
from dynaexq.memory.slab_pool import allocate_bytes
from dynaexq.types import EPOCH, FETCHED, FOUND, SEEN, STEPS, WORDS_AHEAD


class Exchange(Protocol):
    """The device's side. Both calls queue device work in the order of the readers, and can be captured in a graph."""

    def fetch(self, words: Tensor, entries: Tensor) -> None:
        """Copy the table in `words [*]` to `entries [L, E]`, `found` to `fetched`, the epoch to `found`.

        The host may store meanwhile, and nothing is said of the order in which its words are read.
        """

    def report(self, words: Tensor, sums: Tensor, steps: int) -> None:
        """Copy `fetched` to `seen` and `sums [L, E + 2]` to the counts, and add `steps`, 0 or 1."""


class HostMailbox:
    """The words of one runtime: int64, page-locked where the device is a GPU, which then addresses them as well.

    Raises:
        StoreError: the system has no more memory to lock.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        table, counts = num_layers * num_experts, num_layers * (num_experts + 2)
        nbytes = 8 * (WORDS_AHEAD + table + counts)
        if device.type == "cuda":
            with on_device(device):
                locked = Addressable(nbytes)
            memory = locked.bytes
            weakref.finalize(self, run_outside_capture, partial(_unlock, locked, device))
        else:
            memory = allocate_bytes(nbytes, device)
        self.words: Tensor = memory.view(torch.int64).zero_()
        self._array = self.words.numpy()
        self.table = self._array[WORDS_AHEAD:][:table].reshape(num_layers, num_experts)
        self.counts = self._array[WORDS_AHEAD + table :].reshape(num_layers, num_experts + 2)
        self._lock = threading.Lock()

    @property
    def epoch(self) -> int:
        return int(self._array[EPOCH])

    @property
    def seen(self) -> int:
        return int(self._array[SEEN])

    @property
    def steps(self) -> int:
        return int(self._array[STEPS])

    def begin_epoch(self) -> int:
        """A new epoch. A device that finds it finds every store to the table that was made before."""
        # x86 keeps a thread's stores in order; elsewhere the lock's atomic instructions stand between them.
        with self._lock:
            self._array[EPOCH] += 1
            return int(self._array[EPOCH])


def _unlock(locked: Addressable, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # forwards that were queued when their model was forgotten
    locked.close()


class PlainExchange:
    """On tensors of one memory: what others must do. A CPU has no graphs and needs none; it serves as the truth."""

    def fetch(self, words: Tensor, entries: Tensor) -> None:
        """Copy the table in `words [*]` to `entries [L, E]`, `found` to `fetched`, the epoch to `found`."""
        words[FETCHED] = words[FOUND]
        words[FOUND] = words[EPOCH]
        entries.view(-1).copy_(words[WORDS_AHEAD:][: entries.numel()])

    def report(self, words: Tensor, sums: Tensor, steps: int) -> None:
        """Copy `fetched` to `seen` and `sums [L, E + 2]` to the counts, and add `steps`."""
        words[-sums.numel() :].copy_(sums.view(-1))
        words[STEPS] += steps
        words[SEEN] = words[FETCHED]


class EpochFence:
    """The fence of a device that fetches the table itself, forward by forward, eager or replayed.

    A ticket is an epoch, begun after a slot was taken out of the host's table. It passes when the device reports it,
    or a later one, in `seen`. Why no reader reads the slot from then on:

    1. Forwards, eager or replayed, run on the device one after the other; so fetches, reads and reports have an order.
    2. Let R be the report and F the last fetch before it. F took `fetched` from `found`, where the fetch before F had
       left it. So that one had found the epoch, and with it the store that took the slot out; F, which came later,
       fetched a table without the slot. So does every fetch after F.
    3. What was read before F is over. What is read after F, in that forward or any later one, with a fetch of its own
       or without (a backward pass), finds a table that F or a later fetch has left, and so not the slot.

    No order is asked of what happens within a fetch, and no bound on how late a report becomes visible: that only
    delays. Such a bound is what a bare count of ended forwards would need: counted from after the store, one more
    would do for readers that fetch if reports were visible at once, n + 1 more where n may be on their way. The echo
    comes with the second forward that begins after the store.

    Args:
        order: what keeps eager forwards one after the other when they change streams.
        fetch: have the device fetch now.
        synchronize: return when everything that was queued has ended, on whatever stream a replay runs.
    """

    def __init__(self, words: HostMailbox, order: Fence, fetch: Callable[[], None], synchronize: Callable[[], None]):
        self._words, self._order, self._fetch, self._synchronize = words, order, fetch, synchronize
        self._rested = 0

    def reading(self) -> AbstractContextManager[None]:
        return self._order.reading()

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()  # the host's table is written by the host

    def mark(self) -> int:
        return self._words.begin_epoch()

    def passed(self, ticket: int) -> bool:
        return max(self._rested, self._words.seen) >= ticket

    def wait(self, ticket: int) -> None:
        if self.passed(ticket):
            return
        epoch = self._words.epoch
        self._synchronize()  # no forward may ever come; and a fetch on its way may bring what it read long ago
        self._fetch()
        self._synchronize()
        self._rested = epoch
