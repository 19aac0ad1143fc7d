"""Page-locked memory and staging where CUDA's answers are made up: sizes, failures, and who gives memory back."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import patching
import pytest
import tiny
import torch

from dynaexq.errors import StoreError
from dynaexq.memory import CudaCopier, HostMailbox, RamStore
from dynaexq.memory.copy_engine import Arrivals
from dynaexq.memory.pinned import PageLocked
from dynaexq.types import Transition

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
SECONDS = 10  # long enough on any machine; a test that waits so long has failed


class Runtime:
    """Stands in for the CUDA runtime."""

    def __init__(self, status: int = 0):
        self.status, self.locked, self.noted = status, {}, 0
        self.device, self.set_up = 0, set()

    @contextmanager
    def on_device(self, device: torch.device | int) -> Iterator[None]:
        before, self.device = self.device, device if isinstance(device, int) else device.index or 0
        yield
        self.device = before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.set_up.add(self.device)
        if not self.status:
            self.locked[address] = nbytes
        self.noted = self.status or self.noted
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.set_up.add(self.device)
        del self.locked[address]
        return 0

    def ones(self, *size: int, device: object = None, ones: Any = torch.ones, **kinds: Any) -> torch.Tensor:
        """As PyTorch launches a kernel: behind it, what the thread's last failed call left is raised and cleared."""
        if device == "cuda":
            noted, self.noted, device = self.noted, 0, None
            if noted:
                raise RuntimeError(f"CUDA error {noted}")
        return ones(*size, device=device, **kinds)


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Runtime]:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", runtime.on_device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: runtime.device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    event = SimpleNamespace(synchronize=lambda: None, record=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "ones", runtime.ones)
    yield runtime
    gc.collect()  # what was locked here is unlocked here


def test_as_much_is_locked_as_was_asked_for(cuda):
    locked = PageLocked(3 * 4096 + 256)
    assert list(cuda.locked.values()) == [3 * 4096 + 256] == [locked.bytes.numel()]
    assert cuda.locked.keys() == {locked.bytes.data_ptr()}


def test_memory_is_unlocked_once_closed_or_forgotten(cuda):
    closed, forgotten = PageLocked(256), PageLocked(256)
    assert len(cuda.locked) == 2
    closed.close()
    closed.close()
    del forgotten
    gc.collect()
    assert not cuda.locked


def test_what_is_collected_while_a_graph_is_captured_is_given_back_later(cuda, monkeypatch):
    forgotten = [PageLocked(256), HostMailbox(2, 4, torch.device("cuda"))]
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    del forgotten
    gc.collect()
    assert len(cuda.locked) == 2
    assert not synchronized, "the capture would have become invalid"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    PageLocked(256).close()
    assert not cuda.locked
    assert len(synchronized) == 1


def test_nothing_is_locked_for_nothing(cuda):
    PageLocked(0).close()
    assert not cuda.locked


def test_a_store_gives_its_pages_back(cuda):
    store = RamStore(5, 256, pinned=True)
    assert list(cuda.locked.values()) == [5 * 256]
    assert store.page_locked(4) is not None
    store.close()
    assert not cuda.locked
    assert store.nbytes == 0


def test_memory_that_cannot_be_locked_is_refused_with_a_remedy(cuda):
    cuda.status = OUT_OF_MEMORY
    with pytest.raises(StoreError, match=r'cannot page-lock 512 bytes .*CUDA error 2.* use host_copy="ram"'):
        PageLocked(512)


def test_memory_that_cannot_be_locked_is_not_laid_to_the_next_kernel(cuda):
    cuda.status = OUT_OF_MEMORY
    with pytest.raises(StoreError):
        PageLocked(512)
    torch.ones(1, device="cuda")


def test_without_staging_a_copy_fails_and_nothing_else_does(cuda):
    """Then the pipeline releases the slot; an exception here would have left it owned for ever."""
    cuda.status = OUT_OF_MEMORY
    copy = CudaCopier(torch.device("cuda"), 256).start(RamStore(1, 256), 0, torch.empty(256, dtype=torch.uint8))
    assert copy.done
    assert isinstance(copy.error, StoreError)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_copier_sets_up_no_other_device(cuda, pinned):
    """A CUDA context takes some hundred megabytes, of a card that may be full."""
    with cuda.on_device(1):
        store = RamStore(1, 256, pinned)
    copier = CudaCopier(torch.device("cuda", 1), 256)
    copy = copier.start(store, 0, torch.empty(256, dtype=torch.uint8))
    copier.close()
    assert copy.done
    assert copy.error is None
    store.close()
    del copy, copier
    gc.collect()
    assert not cuda.locked
    assert cuda.set_up == {1}


def test_words_set_up_no_other_device(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    words = HostMailbox(2, 4, torch.device("cuda", 1))
    assert len(cuda.locked) == 1
    del words
    gc.collect()
    assert not cuda.locked
    assert cuda.set_up == {1}


def test_a_runtime_that_is_collected_on_the_staging_thread_closes_without_waiting_for_itself(cuda, monkeypatch):
    workers, forgotten, collected = [], threading.Event(), threading.Event()

    def copier_for(device: torch.device, slot_nbytes: int, staged: bool) -> CudaCopier:
        copier = CudaCopier(device, slot_nbytes)
        copier.reserve()
        workers.append(copier._worker)
        return copier

    def read_into(store: RamStore, index: int, out: torch.Tensor) -> None:
        assert forgotten.wait(SECONDS)
        gc.collect()
        collected.set()

    monkeypatch.setattr("dynaexq.runtime.device_runtime.copier_for", copier_for)
    model = tiny.tiny_qwen3_moe()
    pipeline = patching.patch(model, 10**6, tiers=("int2", "int4"), quantizer="rtn").devices[0].pipeline
    runtime = weakref.ref(model.dynaexq)
    assert pipeline.submit(Transition(0, 0, promote=False))
    monkeypatch.setattr(RamStore, "read_into", read_into)
    assert pipeline.submit(Transition(0, 0, promote=True))
    gc.disable()
    knot: list[object] = [model]
    knot.append(knot)
    try:
        del model, pipeline, knot
        assert runtime() is not None, "it has to be garbage that is found there"
        forgotten.set()
        assert collected.wait(SECONDS), "the staging thread waits for itself"
        assert runtime() is None
        for thread in [*workers, *(t for t in threading.enumerate() if t.name == "dynaexq-closing")]:
            thread.join(SECONDS)
            assert not thread.is_alive()
    finally:
        gc.enable()


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_are_reported_together_and_one_that_fails_takes_no_other_along(cuda, pinned, monkeypatch):
    words = []
    expect = Arrivals.expect
    monkeypatch.setattr(Arrivals, "expect", lambda *arguments: words.append(1) or expect(*arguments))
    blocks = torch.randint(0, 256, (9, 256), dtype=torch.uint8)
    store, broken = RamStore(9, 256, pinned), RamStore(9, 256)
    store.write(0, blocks)
    broken.read_into = lambda index, out: 1 / 0
    copier, slots = CudaCopier(torch.device("cuda"), 256), torch.zeros(10, 256, dtype=torch.uint8)
    copies = [copier.start(store, index, slots[index]) for index in range(9)]
    failed = copier.start(broken, 0, slots[9])
    copier.synchronize()
    assert all(copy.done and copy.error is None for copy in copies)
    assert torch.equal(slots[:9], blocks)
    assert isinstance(failed.error, ZeroDivisionError)
    if pinned:
        assert len(words) == 1
    again = copier.start(store, 3, slots[0])
    if pinned:
        assert not again.done, "more may be started"
        copier.flush()
        assert again.done
    copier.close()
    assert again.done
    assert torch.equal(slots[0], blocks[3])
