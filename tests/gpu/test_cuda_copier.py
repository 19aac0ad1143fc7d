"""The copier on a CUDA stream of its own: which bytes arrive, in which order, and what happens when they cannot."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dynaexq.errors import StoreError
from dynaexq.memory import (
    CudaCopier,
    DiskStore,
    ExpertTable,
    HostStore,
    RamStore,
    SlabPool,
    StreamFence,
    SwapPipeline,
    allocate_bytes,
    pinned,
)
from dynaexq.memory.pinned import PageLocked
from dynaexq.memory.slab_pool import Slot
from dynaexq.types import Transition

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")  # without an index, as users write it
COUNT, NBYTES, RING_SLOTS = 32, 2**20, 2  # many more copies than the ring has buffers
SECONDS = 30  # long enough on any machine; a test that waits so long has failed
CYCLES = 2_000_000_000  # about a second of a GPU's clock
STAGING_THREAD = "dynaexq-staging"


class GatedStore(RamStore):
    """Hands out bytes only once the gate is open."""

    def __init__(self, count: int, slot_nbytes: int):
        super().__init__(count, slot_nbytes)
        self.gate = threading.Event()

    def read_into(self, index: int, out: Tensor) -> None:
        assert self.gate.wait(SECONDS)
        super().read_into(index, out)


@pytest.fixture
def copier() -> Iterator[CudaCopier]:
    copier = CudaCopier(DEVICE, NBYTES, RING_SLOTS)
    yield copier
    copier.close()


@pytest.fixture
def blocks() -> Tensor:
    return torch.randint(0, 255, (COUNT, NBYTES), dtype=torch.uint8)


@pytest.fixture
def pool() -> SlabPool:
    pool = SlabPool(NBYTES, DEVICE, StreamFence())
    pool.grow(COUNT)
    return pool


@pytest.fixture
def slots(pool: SlabPool) -> list[Slot]:
    return list(iter(pool.allocate, None))


def filled(store: HostStore, blocks: Tensor) -> HostStore:
    store.write(0, blocks)
    return store


def cut_off(store: DiskStore, index: int) -> DiskStore:
    """The bytes of expert `index` and of those behind it can no longer be read."""
    os.truncate(store._file.fileno(), index * NBYTES)
    return store


def staging_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == STAGING_THREAD]


@pytest.mark.parametrize("pinned", [True, False])
def test_every_slot_receives_the_bytes_of_its_own_expert(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot], pinned: bool
) -> None:
    store = filled(RamStore(COUNT, NBYTES, pinned), blocks)
    order = torch.randperm(COUNT).tolist()
    copies = [copier.start(store, index, slot.bytes) for index, slot in zip(order, slots, strict=True)]
    copier.synchronize()
    assert all(copy.done and copy.error is None for copy in copies)
    for index, slot in zip(order, slots, strict=True):
        assert torch.equal(slot.bytes.cpu(), blocks[index])


def test_only_what_is_not_page_locked_goes_through_the_staging_thread(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot]
) -> None:
    copier.start(filled(RamStore(COUNT, NBYTES, pinned=True), blocks), 0, slots[0].bytes)
    assert not staging_threads()
    copier.start(filled(RamStore(COUNT, NBYTES), blocks), 1, slots[1].bytes)
    assert len(staging_threads()) == 1


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_end_in_the_order_in_which_they_were_started(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot], pinned: bool
) -> None:
    store = filled(RamStore(COUNT, NBYTES, pinned), blocks)
    copies = [copier.start(store, index, slots[index].bytes) for index in range(COUNT)]
    copier.flush()
    while not copies[-1].done:
        # Looked at from the last to the first: one that ends in between makes the earlier ones done, never the later.
        done = [copy.done for copy in reversed(copies)]
        assert done == sorted(done)
    assert all(copy.done for copy in copies)


def test_a_slot_written_twice_keeps_the_later_bytes(copier: CudaCopier, blocks: Tensor, slots: list[Slot]) -> None:
    store = filled(RamStore(COUNT, NBYTES), blocks)
    for index in range(COUNT):
        copier.start(store, index, slots[0].bytes)
    copier.synchronize()
    assert torch.equal(slots[0].bytes.cpu(), blocks[-1])


def test_a_copy_is_not_done_before_its_bytes_could_be_read(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot]
) -> None:
    store = GatedStore(COUNT, NBYTES)
    store.write(0, blocks)
    copy = copier.start(store, 0, slots[0].bytes)
    assert not copy.done
    store.gate.set()
    copier.synchronize()
    assert copy.done
    assert torch.equal(slots[0].bytes.cpu(), blocks[0])


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_do_not_wait_for_the_compute_stream(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot], pinned: bool
) -> None:
    store = filled(RamStore(COUNT, NBYTES, pinned), blocks)
    copier.start(store, 0, slots[0].bytes)  # reserves the ring first: page-locking may stop the whole device
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    computed = torch.cuda.Event()
    computed.record()
    copy = copier.start(store, 1, slots[1].bytes)
    copier.synchronize()
    assert copy.done
    assert not computed.query()
    assert torch.equal(slots[1].bytes.cpu(), blocks[1])


def test_a_copy_that_fails_says_why_and_those_around_it_arrive(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot]
) -> None:
    store = cut_off(filled(DiskStore(COUNT, NBYTES), blocks), 2)
    order = [0, 5, 1, 6, 0, 7, 1]
    copies = [copier.start(store, index, slots[turn].bytes) for turn, index in enumerate(order)]
    copier.synchronize()
    for index, copy, slot in zip(order, copies, slots, strict=False):
        assert copy.done
        assert isinstance(copy.error, StoreError) == (index >= 2)
        assert index >= 2 or torch.equal(slot.bytes.cpu(), blocks[index])
    store.close()


def test_whatever_a_store_raises_the_staging_thread_lives_on(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot]
) -> None:
    broken, store = RamStore(COUNT, NBYTES), filled(RamStore(COUNT, NBYTES), blocks)
    broken.read_into = lambda index, out: 1 / 0
    failed, arrived = copier.start(broken, 0, slots[0].bytes), copier.start(store, 1, slots[1].bytes)
    copier.synchronize()
    assert failed.done
    assert isinstance(failed.error, ZeroDivisionError)
    assert arrived.error is None
    assert torch.equal(slots[1].bytes.cpu(), blocks[1])


def test_closing_finishes_what_was_started_and_ends_the_thread(
    copier: CudaCopier, blocks: Tensor, slots: list[Slot]
) -> None:
    store = filled(RamStore(COUNT, NBYTES), blocks)
    copies = [copier.start(store, index, slots[index].bytes) for index in range(COUNT)]
    copier.close()
    assert not staging_threads()
    assert all(copy.done for copy in copies)
    for index, slot in enumerate(slots):
        assert torch.equal(slot.bytes.cpu(), blocks[index])
    copier.close()  # once more does no harm


def test_memory_is_handed_out_when_kernels_queued_for_its_last_owner_have_ended() -> None:
    torch.cuda._sleep(CYCLES)
    computed = torch.cuda.Event()
    computed.record()
    allocate_bytes.__wrapped__(NBYTES, DEVICE)  # without the poison, which waits as well
    assert computed.query()


def test_memory_that_cannot_be_locked_is_not_laid_to_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = PageLocked(NBYTES)
    monkeypatch.setattr(pinned, "allocate_bytes", lambda nbytes, device: locked.bytes)
    with pytest.raises(StoreError, match="CUDA error 712"):  # cudaErrorHostMemoryAlreadyRegistered
        PageLocked(NBYTES)
    assert int(torch.arange(3, device=DEVICE).sum()) == 3


def test_a_ticket_passes_when_the_kernels_queued_before_it_have_ended() -> None:
    fence = StreamFence()
    torch.cuda._sleep(CYCLES)
    ticket = fence.mark()
    assert not fence.passed(ticket)
    fence.wait(ticket)
    assert fence.passed(ticket)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_move_is_copied_published_and_retired_without_the_host_waiting(
    copier: CudaCopier, blocks: Tensor, pool: SlabPool, pinned: bool
) -> None:
    table = ExpertTable(1, COUNT, DEVICE)
    pipeline = SwapPipeline(table, pool, filled(RamStore(COUNT, NBYTES, pinned), blocks), copier, kind=8)
    for expert in range(COUNT):
        assert pipeline.submit(Transition(0, expert, promote=True))
    pipeline.drain()
    assert table.entries.tolist() == [table.row(0).tolist()]
    for expert, entry in enumerate(table.row(0).tolist()):
        assert torch.equal(pool.at(entry & ~0xFF).cpu(), blocks[expert])
    torch.cuda._sleep(CYCLES)  # a reader of every slot
    assert pipeline.submit(Transition(0, 0, promote=False))
    assert not pipeline.submit(Transition(0, 0, promote=True)), "the only free slot may still be read"
    torch.cuda.synchronize()
    assert pipeline.submit(Transition(0, 0, promote=True))
    pipeline.drain()
    assert (table.kinds() == 8).all()


def test_a_failed_move_leaves_the_base_and_frees_its_slot(copier: CudaCopier, blocks: Tensor, pool: SlabPool) -> None:
    store = cut_off(filled(DiskStore(COUNT, NBYTES), blocks), 3)
    pipeline = SwapPipeline(ExpertTable(1, COUNT, DEVICE), pool, store, copier, kind=8)
    for _ in range(3):
        assert pipeline.submit(Transition(0, 3, promote=True))
        pipeline.drain()
    assert pipeline.barred.nonzero()[1].tolist() == [3]
    assert pipeline.counts.failed == 3
    assert not pipeline.table.entries.any()
    assert pool.num_available == pool.num_slots
    store.close()
