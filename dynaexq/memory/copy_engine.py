"""How upgrade bytes reach their slot: at once on a CPU, on a stream of their own on CUDA, by hand in tests."""

import contextlib
import ctypes
import queue
import sys
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dynaexq.errors import StoreError
from dynaexq.memory.host_store import HostStore
from dynaexq.memory.pinned import PageLocked, on_device
from dynaexq.memory.slab_pool import allocate_bytes

WORDS_PER_PAGE = 4096


class Arrival:
    """What one copy waits for. `word` int64 `[1]`, page-locked, is to receive the copy's last 8 bytes."""

    def __init__(self, word: Tensor, expected: int, free: list[Tensor]):
        self.word, self._expected, self._free = word, expected, free

    def has_come(self) -> bool:
        """Whether the copy has arrived. After True the word is reused, and this object must not be asked again."""
        if int(self.word) != self._expected:
            return False
        self._free.append(self.word)
        return True


class Arrivals:
    """Words for any number of copies on their way.

    Args:
        locked: False where host and device are the same, as in tests.
    """

    def __init__(self, locked: bool = True):
        self._is_locked = locked
        self._pages: list[PageLocked] = []
        self._free: list[Tensor] = []

    def reserve(self) -> None:
        """Make sure of words for a copy. Raises StoreError."""
        if self._free:
            return
        nbytes = 8 * WORDS_PER_PAGE
        if self._is_locked:
            self._pages.append(PageLocked(nbytes))
            memory = self._pages[-1].bytes
        else:
            memory = allocate_bytes(nbytes, torch.device("cpu"))
        self._free.extend(memory.view(torch.int64).split(1))

    def take(self) -> Tensor:
        """A word for `expect`. Raises StoreError."""
        self.reserve()
        return self._free.pop()

    def expect(self, source: Tensor, word: Tensor) -> Arrival:
        """Have a word wait for the last 8 bytes of uint8 `source`, which lies in host memory."""
        expected = int(last_word(source))
        word.fill_(~expected)
        return Arrival(word, expected, self._free)


def last_word(data: Tensor) -> Tensor:
    """The last 8 bytes of uint8 `data [8 n]` as int64 `[1]`, in place."""
    return data[-8:].view(torch.int64)


class Copy:
    """One copy on its way. `done` once no byte of it can change any more; `error` says whether it failed."""

    error: Exception | None = None
    _finished = False

    @property
    def done(self) -> bool:
        return self._finished

    def finish(self, error: Exception | None = None) -> None:
        self.error, self._finished = error, True


class Copier(Protocol):
    """Moves upgrades from a store into slots."""

    def start(self, store: HostStore, index: int, out: Tensor) -> Copy:
        """Begin to copy upgrade `index` into the slot bytes `out`; `out` belongs to the copy until it is done."""

    def flush(self) -> None:
        """No more is started for now: from here on copies can be found to be done. Never waits."""

    def synchronize(self) -> None:
        """Return once every copy that was started is done."""

    def close(self) -> None:
        """Finish all copies and stop."""


class EagerCopier:
    """Copies on the spot; for a CPU, where there is nothing to overlap with."""

    def start(self, store: HostStore, index: int, out: Tensor) -> Copy:
        copy = Copy()
        try:
            store.read_into(index, out)
        except Exception as error:  # whatever it is, the move fails and generation goes on
            copy.finish(error)
        else:
            copy.finish()
        return copy

    def flush(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class ManualCopier:
    """For tests: bytes arrive, or fail to, when the test calls `complete` or `fail`, in any order."""

    def __init__(self) -> None:
        self.pending: list[tuple[Copy, HostStore, int, Tensor]] = []

    def start(self, store: HostStore, index: int, out: Tensor) -> Copy:
        out.fill_(0xEE)  # a reader that looks too early must not find something plausible
        copy = Copy()
        self.pending.append((copy, store, index, out))
        return copy

    def complete(self, position: int) -> None:
        copy, store, index, out = self.pending.pop(position)
        store.read_into(index, out)
        copy.finish()

    def fail(self, position: int) -> None:
        self.pending.pop(position)[0].finish(StoreError("failed by the test"))

    def flush(self) -> None:
        pass

    def synchronize(self) -> None:
        while self.pending:
            self.complete(0)

    def close(self) -> None:
        self.synchronize()


class Batch:
    """Copies queued one behind the other on a stream: when the last has arrived, so have all.

    One word comes back for all of them, because between copies in the two directions the link idles.

    Args:
        queue: copies its second argument into its first one, behind what was queued before.

    Raises:
        StoreError: there is no word to be had.
    """

    def __init__(self, arrivals: Arrivals, queue: Callable[[Tensor, Tensor], None]):
        self._arrivals, self._queue = arrivals, queue
        self._last: tuple[Tensor, Tensor] | None = None
        self._arrival: Arrival | None = None
        self._has_come = False
        self._word = arrivals.take()

    def add(self, source: Tensor, out: Tensor) -> None:
        """Queue a copy of uint8 `source`, in host memory, into `out`."""
        self._queue(out, source)
        self._last = source, out

    def end(self) -> None:
        """Have it reported when the copies so far have arrived; there will be no others."""
        assert self._last is not None, "a batch is begun for a copy"
        source, out = self._last
        arrival = self._arrivals.expect(source, self._word)
        self._queue(arrival.word, last_word(out))
        self._arrival = arrival

    def has_come(self) -> bool:
        """Whether it was ended, and all copies have arrived."""
        if not self._has_come and self._arrival is not None:
            self._has_come = self._arrival.has_come()
        return self._has_come


class _CudaCopy(Copy):
    """Done when its batch has come, in which it is once it has been queued on the stream."""

    batch: Batch | None = None

    @property
    def done(self) -> bool:
        if not self._finished and self.batch is not None and self.batch.has_come():
            self.finish()
        return self._finished


class CudaCopier:
    """Copies on a CUDA stream of its own, which the compute stream never waits for; a copy engine does the work.

    From page-locked stores the stream fetches directly. From others a worker thread first fills one of `ring_slots`
    page-locked buffers; a buffer is filled again only after the event behind its last copy.
    """

    def __init__(self, device: torch.device, slot_nbytes: int, ring_slots: int = 4):
        self._stream = torch.cuda.Stream(device)  # at the lowest priority, which is the default
        self._slot_nbytes, self._ring_slots = slot_nbytes, ring_slots
        self._ring: PageLocked | None = None
        self._arrivals = Arrivals()
        self._batch: Batch | None = None
        self._jobs: queue.Queue[tuple[_CudaCopy, HostStore, int, Tensor] | None] = queue.Queue()
        self._worker: threading.Thread | None = None

    def reserve(self) -> None:
        """Set up staging now and not with the first copy that needs it. Raises StoreError."""
        with on_device(self._stream.device):
            self._arrivals.reserve()
            if self._worker is None:
                self._ring = PageLocked(self._ring_slots * self._slot_nbytes)
                buffers = list(self._ring.bytes.view(self._ring_slots, self._slot_nbytes))
                self._worker = threading.Thread(
                    target=self._work, args=(buffers,), name="dynaexq-staging", daemon=True
                )
                self._worker.start()

    def start(self, store: HostStore, index: int, out: Tensor) -> Copy:
        copy = _CudaCopy()
        source = store.page_locked(index)
        try:
            if source is None:
                self.reserve()
                self._jobs.put((copy, store, index, out))
            else:
                self._batch = self._batch or self._new_batch()
                self._batch.add(source, out)
                copy.batch = self._batch
        except StoreError as error:
            copy.finish(error)
        return copy

    def flush(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.end()

    def synchronize(self) -> None:
        self.flush()
        self._jobs.join()
        self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        if self._worker is not None:
            self._jobs.put(None)
            self._worker.join()
            self._worker = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _new_batch(self) -> Batch:
        with on_device(self._stream.device):  # where memory is locked
            return Batch(self._arrivals, self._queue)

    def _queue(self, out: Tensor, source: Tensor) -> None:
        with on_device(self._stream.device), torch.cuda.stream(self._stream):
            out.copy_(source, non_blocking=True)

    def _work(self, buffers: list[Tensor]) -> None:
        torch.cuda.set_device(self._stream.device)  # which has an index even where the device given had none
        leave_captures_alone()
        last_use = [torch.cuda.Event() for _ in buffers]
        turn, batch = 0, None
        while (job := self._jobs.get()) is not None:
            copy, store, index, out = job
            try:
                last_use[turn].synchronize()
                store.read_into(index, buffers[turn])
                batch = batch or self._new_batch()
                copy.batch = batch
                batch.add(buffers[turn], out)
                last_use[turn].record(self._stream)
            except Exception as error:  # whatever it is, the move fails and generation goes on
                copy.finish(error)
            if batch is not None and (self._jobs.empty() or turn == len(buffers) - 1):
                batch.end()  # before a buffer is filled again, whose last bytes the word is compared with
                batch = None
            self._jobs.task_done()
            turn = (turn + 1) % len(buffers)
        self._jobs.task_done()


def leave_captures_alone() -> None:
    """Let this thread use its own streams while another captures a graph, without making that capture invalid.

    By default CUDA forbids such calls to every thread for as long as any captures. A thread may opt out, through the
    driver only; PyTorch has no door to it.
    """
    relaxed = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED, and HIP's
    library, function = _capture_mode_door()
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(library), function)(ctypes.byref(relaxed))


def _capture_mode_door() -> tuple[str, str]:
    """The library of the driver, and the name of what changes a thread's mode."""
    if torch.version.hip is not None:
        return "libamdhip64.so", "hipThreadExchangeStreamCaptureMode"
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1", "cuThreadExchangeStreamCaptureMode"


def copier_for(device: torch.device, slot_nbytes: int, staged: bool = True) -> Copier:
    """The copier that suits `device`; `staged` if the store's bytes are not page-locked. Raises StoreError."""
    if device.type != "cuda":
        return EagerCopier()
    copier = CudaCopier(device, slot_nbytes)
    if staged:
        copier.reserve()
    return copier
