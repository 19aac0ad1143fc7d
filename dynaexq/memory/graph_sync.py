"""Words that host and device share, so that a graph captured once follows the host without any CUDA call of it.

The first layer of every forward *fetches*: it copies the host's table of experts to the device. The last *reports*
what was routed, and of how late a table it was. Both are kernels, so a replay of the graph does what the captured
forward did. The host only loads and stores.

    word        written by   means
    epoch       host         moments at which the host took something out of the table, counted
    found       fetch        the epoch, as the last fetch found it
    fetched     fetch        the epoch, as the fetch before the last had found it: surely older than the device's table
    seen        report       `fetched`, when a forward has ended
    steps       report       forwards that have ended, and were observed
    table       host         `[num_layers, num_experts]`, entries as in `memory.table`
    counts      report       `[num_layers, num_experts + 2]`, the sums of `memory.counter`

This module knows neither what an entry means nor when memory may be used again; `echo.EchoFence` concludes that.
"""

import threading
import weakref
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dynaexq.memory.pinned import PageLocked, on_device
from dynaexq.memory.release import release
from dynaexq.memory.slab_pool import allocate_bytes
from dynaexq.types import EPOCH, SEEN, STEPS, WORDS_AHEAD


class Exchange(Protocol):
    """The device's side. Both calls queue device work in the order of the readers, and can be captured in a graph."""

    def fetch(self, words: Tensor, entries: Tensor) -> None:
        """Copy the table in `words [*]` to `entries [L, E]`, `found` to `fetched`, the epoch to `found`.

        The host may store meanwhile, and nothing is said of the order in which its words are read.
        """

    def report(self, words: Tensor, sums: Tensor, steps: int) -> None:
        """Copy `fetched` to `seen` and `sums [L, E + 2]` to the counts, and add `steps`, 0 or 1."""


class HostWords:
    """The words of one runtime: int64, page-locked where the device is a GPU, which then addresses them as well.

    Raises:
        StoreError: the system has no more memory to lock.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        table, counts = num_layers * num_experts, num_layers * (num_experts + 2)
        nbytes = 8 * (WORDS_AHEAD + table + counts)
        if device.type == "cuda":
            with on_device(device):
                locked = PageLocked(nbytes)
            memory = locked.bytes
            weakref.finalize(self, release, partial(_unlock, locked, device))
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


def _unlock(locked: PageLocked, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # forwards that were queued when their model was forgotten
    locked.close()
