"""Page-locked memory and staging where CUDA's answers are made up: sizes, failures, and who gives memory back."""

import gc
from types import SimpleNamespace

import pytest
import torch

from dynaexq.errors import StoreError
from dynaexq.memory import CudaCopier, RamStore
from dynaexq.memory.pinned import PageLocked

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class Runtime:
    """Stands in for the CUDA runtime."""

    def __init__(self, status: int = 0):
        self.status, self.locked = status, {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.status:
            self.locked[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def cuda(monkeypatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    return runtime


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


def test_without_staging_a_copy_fails_and_nothing_else_does(cuda):
    """Then the pipeline releases the slot; an exception here would have left it owned for ever."""
    cuda.status = OUT_OF_MEMORY
    copy = CudaCopier(torch.device("cuda"), 256).start(RamStore(1, 256), 0, torch.empty(256, dtype=torch.uint8))
    assert copy.done
    assert isinstance(copy.error, StoreError)
