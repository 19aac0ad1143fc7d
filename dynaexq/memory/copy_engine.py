"""How upgrade bytes reach their slot: at once on a CPU, on a stream of their own on CUDA, by hand in tests."""

import contextlib
import ctypes
import queue
import sys
import threading
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

    def expect(self, source: Tensor) -> Arrival:
        """A word that waits for the last 8 bytes of uint8 `source`, which lies in host memory. Raises StoreError."""
        self.reserve()
        expected = int(last_word(source))
        word = self._free.pop()
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

    def synchronize(self) -> None:
        while self.pending:
            self.complete(0)

    def close(self) -> None:
        self.synchronize()


class _CudaCopy(Copy):
    """Done when its last bytes have come back; `arrival` exists once the copy has been queued on the stream."""

    arrival: Arrival | None = None

    @property
    def done(self) -> bool:
        if not self._finished and self.arrival is not None and self.arrival.has_come():
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
            if source is not None:
                self._queue(copy, source, out)
            else:
                self.reserve()
                self._jobs.put((copy, store, index, out))
        except StoreError as error:
            copy.finish(error)
        return copy

    def synchronize(self) -> None:
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

    def _queue(self, copy: _CudaCopy, source: Tensor, out: Tensor) -> None:
        with on_device(self._stream.device), torch.cuda.stream(self._stream):
            arrival = self._arrivals.expect(source)
            out.copy_(source, non_blocking=True)
            arrival.word.copy_(last_word(out), non_blocking=True)
        copy.arrival = arrival

    def _work(self, buffers: list[Tensor]) -> None:
        torch.cuda.set_device(self._stream.device)  # which has an index even where the device given had none
        leave_captures_alone()
        last_use = [torch.cuda.Event() for _ in buffers]
        turn = 0
        while (job := self._jobs.get()) is not None:
            copy, store, index, out = job
            try:
                last_use[turn].synchronize()
                store.read_into(index, buffers[turn])
                self._queue(copy, buffers[turn], out)
                last_use[turn].record(self._stream)
            except Exception as error:  # whatever it is, the move fails and generation goes on
                copy.finish(error)
            finally:
                self._jobs.task_done()
            turn = (turn + 1) % len(buffers)
        self._jobs.task_done()


def leave_captures_alone() -> None:
    """Let this thread use its own streams while another captures a graph, without making that capture invalid.

    By default CUDA forbids such calls to every thread for as long as any captures. A thread may opt out, through the
    driver only; PyTorch has no door to it.
    """
    relaxed = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    with contextlib.suppress(OSError):  # ROCm has no such library and no such rule
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))


def copier_for(device: torch.device, slot_nbytes: int, staged: bool = True) -> Copier:
    """The copier that suits `device`; `staged` if the store's bytes are not page-locked. Raises StoreError."""
    if device.type != "cuda":
        return EagerCopier()
    copier = CudaCopier(device, slot_nbytes)
    if staged:
        copier.reserve()
    return copier
