"""The parts of the memory room one by one: stores, fences, counters, the table and the pool, on a CPU."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynaexq.errors import ReentryError, StoreError
from dynaexq.memory import (
    DiskStore,
    EagerCopier,
    ExpertTable,
    HostStore,
    ManualCopier,
    ManualFence,
    RamStore,
    ReaderFence,
    RoutingCounter,
    SlabPool,
    SwapPipeline,
    allocate_bytes,
    slab_pool,
)
from dynaexq.memory.device_memory import measure_link
from dynaexq.memory.fences import Fence
from dynaexq.memory.graph_sync import HostMailbox
from dynaexq.types import LARGEST_MASS, MASS_UNIT, Transition, split_entry

CPU = torch.device("cpu")
COUNT, NBYTES = 6, 512
SECONDS = 10  # long enough for any thread on any machine; a test that waits so long has failed


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 255, shape, dtype=torch.uint8)  # never 255, the poison


def new_pool(num_slots: int, fence: Fence | None = None) -> SlabPool:
    pool = SlabPool(NBYTES, CPU, fence or ManualFence())
    pool.grow(num_slots)
    return pool


def new_pipeline(store: HostStore, num_slots: int, fence: Fence | None = None) -> SwapPipeline:
    return SwapPipeline(ExpertTable(1, COUNT, CPU), new_pool(num_slots, fence), store, EagerCopier(), kind=8)


def promote(pipeline: SwapPipeline, expert: int) -> bool:
    begun = pipeline.submit(Transition(0, expert, promote=True))
    pipeline.settle()
    return begun


@pytest.mark.parametrize("new_store", [RamStore, DiskStore])
def test_a_store_gives_back_what_was_written(new_store: Callable[[int, int], HostStore]) -> None:
    store, blocks = new_store(COUNT, NBYTES), random_bytes(COUNT, NBYTES)
    store.write(2, blocks[2:])
    store.write(0, blocks[:2])
    for index in (3, 0, 5, 1, 4, 2):
        out = allocate_bytes(NBYTES, CPU)
        store.read_into(index, out)
        assert torch.equal(out, blocks[index])
        assert store.page_locked(index) is None
    store.close()


def test_a_disk_store_takes_no_host_memory() -> None:
    store = DiskStore(4, 1024)
    assert store.nbytes == 0
    store.close()


def test_a_ram_store_counts_its_bytes_and_gives_them_back_when_closed() -> None:
    store = RamStore(COUNT, NBYTES)
    assert store.nbytes == COUNT * NBYTES
    store.close()
    assert store.nbytes == 0


def test_a_disk_store_keeps_more_than_one_system_call_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data)[: 2 * NBYTES], offset))
    store, blocks, out = DiskStore(COUNT, NBYTES), random_bytes(COUNT, NBYTES), allocate_bytes(NBYTES, CPU)
    store.write(0, blocks)
    store.read_into(COUNT - 1, out)
    assert torch.equal(out, blocks[COUNT - 1])
    store.close()


def test_a_disk_that_cannot_be_written_to_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(COUNT, NBYTES)

    def fail(*arguments: object) -> int:
        raise OSError("by the test")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StoreError, match="cannot write the upgrade of expert 1: by the test"):
        store.write(1, random_bytes(1, NBYTES))
    store.close()


def test_a_disk_that_takes_only_a_part_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(COUNT, NBYTES)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: NBYTES - 1)
    with pytest.raises(StoreError, match=f"wrote {NBYTES - 1} of {NBYTES} bytes"):
        store.write(0, random_bytes(1, NBYTES))
    store.close()


def test_a_truncated_file_is_a_store_error_for_the_experts_behind_the_cut() -> None:
    store, blocks, out = DiskStore(COUNT, NBYTES), random_bytes(COUNT, NBYTES), allocate_bytes(NBYTES, CPU)
    store.write(0, blocks)
    os.truncate(store._file.fileno(), 2 * NBYTES + 100)
    store.read_into(1, out)
    assert torch.equal(out, blocks[1])
    with pytest.raises(StoreError, match=f"read 100 of {NBYTES} bytes of expert 2"):
        store.read_into(2, out)
    with pytest.raises(StoreError, match="read 0 of"):
        store.read_into(3, out)
    store.close()


def test_a_full_disk_is_refused_with_a_remedy_and_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    files = os.listdir("/proc/self/fd")
    with pytest.raises(StoreError, match=r'3,072 bytes .* No space left .* use host_copy="ram"'):
        DiskStore(COUNT, NBYTES)
    assert os.listdir("/proc/self/fd") == files


def test_a_directory_that_is_not_there_is_refused_with_a_remedy(tmp_path) -> None:
    with pytest.raises(StoreError, match="point TMPDIR elsewhere"):
        DiskStore(COUNT, NBYTES, tmp_path / "missing")


def test_an_expert_whose_bytes_are_gone_loses_no_slot_and_is_left_alone_for_longer_and_longer() -> None:
    store = DiskStore(COUNT, NBYTES)
    blocks = random_bytes(COUNT, NBYTES)
    store.write(0, blocks)
    os.truncate(store._file.fileno(), NBYTES)
    pipeline = new_pipeline(store, num_slots=1)
    waited = []
    for attempt in range(5):
        assert not pipeline.barred.any()
        assert promote(pipeline, expert=4)
        assert pipeline.counts.failed == attempt + 1
        assert not pipeline.upgraded.any()
        assert not pipeline.table.kinds().any()
        assert pipeline.pool.num_available == 1
        waited.append(0)
        while pipeline.barred.any():
            assert np.argwhere(pipeline.barred).tolist() == [[0, 4]]
            pipeline.tick()
            waited[-1] += 1
    assert waited == [1, 2, 4, 8, 16]
    assert promote(pipeline, expert=0)
    address, kind = split_entry(int(pipeline.table.entries[0, 0]))
    assert kind == 8
    assert torch.equal(pipeline.pool.at(address), blocks[0])
    pipeline.close()


def test_whatever_a_store_raises_the_move_fails_and_the_slot_is_free_again() -> None:
    store = RamStore(COUNT, NBYTES)
    store.read_into = lambda index, out: 1 / 0
    pipeline = new_pipeline(store, num_slots=1)
    assert promote(pipeline, expert=1)
    assert pipeline.counts.failed == 1
    assert pipeline.pool.num_available == 1


def test_closing_a_pipeline_publishes_what_was_in_flight_and_closes_the_store() -> None:
    store, copier = RamStore(COUNT, NBYTES), ManualCopier()
    pipeline = SwapPipeline(ExpertTable(1, COUNT, CPU), new_pool(2), store, copier, kind=4)
    promote(pipeline, expert=3)
    assert pipeline.num_in_flight == 1
    pipeline.close()
    assert pipeline.num_in_flight == 0
    assert pipeline.table.kinds().tolist() == [[0, 0, 0, 4, 0, 0]]
    assert store.nbytes == 0


class Reader(threading.Thread):
    """A thread that reads from `start` until `leave`."""

    def __init__(self, fence: ReaderFence):
        super().__init__(daemon=True)
        self.fence, self.begun, self.may_leave = fence, threading.Event(), threading.Event()

    def run(self) -> None:
        with self.fence.reading():
            self.begun.set()
            self.may_leave.wait(SECONDS)

    def begin(self) -> "Reader":
        self.start()
        assert self.begun.wait(SECONDS)
        return self

    def leave(self) -> None:
        self.may_leave.set()
        self.join(SECONDS)
        assert not self.is_alive()


def test_an_older_reader_holds_a_ticket_back_and_a_later_one_does_not() -> None:
    fence = ReaderFence()
    assert fence.passed(fence.mark())
    first, second = Reader(fence).begin(), Reader(fence).begin()
    ticket = fence.mark()
    later = Reader(fence).begin()
    assert not fence.passed(ticket)
    second.leave()
    assert not fence.passed(ticket)
    first.leave()
    assert fence.passed(ticket)
    assert not fence.passed(fence.mark())
    later.leave()
    assert fence.passed(fence.mark())


def test_waiting_returns_when_the_last_older_reader_has_left() -> None:
    fence = ReaderFence()
    old = Reader(fence).begin()
    ticket = fence.mark()
    later = Reader(fence).begin()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fence.wait, ticket)
        assert not wait([waiting], timeout=0.05).done
        old.leave()
        waiting.result(timeout=SECONDS)
        assert later.is_alive()
        later.leave()


def test_a_reader_that_raises_has_left() -> None:
    fence = ReaderFence()
    with pytest.raises(RuntimeError), fence.reading():
        raise RuntimeError
    assert fence.passed(fence.mark())


@pytest.fixture
def _eager_switches() -> Iterator[None]:
    """Threads take turns a hundred times as often as by default, so that they meet in the middle of things."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_eager_switches")
def test_threads_that_read_while_experts_move_find_only_whole_upgrades() -> None:
    store, blocks, fence = RamStore(COUNT, NBYTES), random_bytes(COUNT, NBYTES), ReaderFence()
    store.write(0, blocks)
    pipeline = new_pipeline(store, num_slots=3, fence=fence)

    found, finished = [0, 0], threading.Event()

    def read(thread: int) -> None:
        while not finished.is_set():
            with fence.reading():
                row = pipeline.table.row(0)
                time.sleep(0)  # a turn for the thread that moves experts
                for expert, entry in enumerate(row):
                    address, kind = split_entry(int(entry))
                    if kind:
                        assert torch.equal(pipeline.pool.at(address), blocks[expert])
                        found[thread] += 1

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read, thread) for thread in range(2)]
        try:
            while min(found) < 300 or pipeline.counts.demotions < 100:
                for expert in torch.randperm(COUNT).tolist():
                    pipeline.submit(Transition(0, expert, promote=not pipeline.upgraded[0, expert]))
                    pipeline.settle()
                if any(reader.done() for reader in readers):
                    break  # it found what it should not have
        finally:
            finished.set()
        for reader in readers:
            reader.result()


def naive_sums(ids: Tensor, weights: Tensor, num_experts: int) -> list[int]:
    """Fixed-point mass of every expert, of foreign ids, and the tokens, one assignment at a time."""
    sums = [0] * (num_experts + 1) + [len(ids)]
    for expert, weight in zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True):
        mass = min(max(weight, 0.0), LARGEST_MASS) if math.isfinite(weight) else 0.0
        sums[min(expert, num_experts)] += round(mass * MASS_UNIT)
    return sums


@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.integers(0, 9), st.floats(width=16) | st.sampled_from([0.0, 1.0, 0.3, 1e9, -1.0])),
            min_size=2,
            max_size=2,
        ),
        max_size=6,
    ),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    id_dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_a_counter_agrees_with_a_sum_taken_by_hand(rows, weight_dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    routing = torch.tensor(rows, dtype=torch.float64).view(-1, 2, 2)  # [N, k, (id, weight)]
    ids, weights = routing[..., 0].to(id_dtype), routing[..., 1].to(weight_dtype)
    kept = weights.clone()
    counter = RoutingCounter(num_layers=2, num_experts=7, device=CPU)  # ids 7 and above are foreign
    counter.observe(1, ids, weights)
    expected = naive_sums(ids, weights, num_experts=7)
    assert counter.sums.tolist() == [[0] * 9, expected]
    torch.testing.assert_close(weights, kept, rtol=0, atol=0, equal_nan=True)
    mass, tokens = counter.drain()
    assert mass.tolist() == [[0.0] * 7, [s / MASS_UNIT for s in expected[:7]]]
    assert tokens.tolist() == [0, len(rows)]


def test_sums_only_grow_and_what_was_drained_adds_up_to_them() -> None:
    counter = RoutingCounter(num_layers=2, num_experts=4, device=CPU)
    drained, seen = np.zeros((2, 4)), np.zeros(2, dtype=np.int64)
    for step in range(50):
        before = counter.sums.clone()
        counter.observe(step % 2, torch.randint(0, 6, (3, 2)), torch.randn(3, 2))
        assert (counter.sums >= before).all()
        if step % 7 == 0:
            mass, tokens = counter.drain()
            drained, seen = drained + mass, seen + tokens
    mass, tokens = counter.drain()
    np.testing.assert_array_equal(drained + mass, counter.sums[:, :4].numpy() / MASS_UNIT)
    np.testing.assert_array_equal(seen + tokens, [75, 75])
    assert not np.any(counter.drain()[0])


@pytest.mark.usefixtures("_eager_switches")
def test_two_threads_that_observe_at_once_lose_nothing() -> None:
    counter = RoutingCounter(num_layers=1, num_experts=4, device=CPU)
    ids, weights = torch.arange(2**16).view(-1, 2) % 4, torch.ones(2**15, 2)  # sums that take long enough to collide
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(counter.observe, 0, ids, weights) for _ in range(300)]:
            done.result()
    mass, tokens = counter.drain()
    assert mass.tolist() == [[300 * 2.0**14] * 4]
    assert tokens.tolist() == [300 * 2**15]


def test_what_is_published_can_be_split_again_and_the_mirror_equals_the_device() -> None:
    table = ExpertTable(2, 4, CPU)
    address = 0x7FFF_FFFF_FF00  # the highest a user process gets
    table.publish(0, 1, address, 8)
    table.publish(1, 3, 0x1200, 255)
    assert split_entry(int(table.entries[0, 1])) == (address, 8)
    assert split_entry(int(table.entries[1, 3])) == (0x1200, 255)
    assert table.kinds().tolist() == [[0, 8, 0, 0], [0, 0, 0, 255]]
    row = table.row(0)
    table.unpublish(0, 1)
    assert split_entry(int(row[1])) == (address, 8)  # a snapshot stays as it was
    assert table.kinds().tolist() == [[0, 0, 0, 0], [0, 0, 0, 255]]
    assert table.nbytes == 2 * 4 * 8
    for layer in range(2):
        np.testing.assert_array_equal(table.kinds()[layer], table.row(layer).numpy() & 0xFF)


@pytest.mark.parametrize(("address", "kind"), [(0x1280, 8), (0x1200, 0), (0x1200, 256)])
def test_an_entry_that_could_not_be_split_is_never_written(address: int, kind: int) -> None:
    table = ExpertTable(1, 1, CPU)
    with pytest.raises(AssertionError):
        table.publish(0, 0, address, kind)
    assert not table.entries.any()


@pytest.mark.parametrize("nbytes", [0, 1, 256, 4097, 2**20])
def test_bytes_are_aligned_writable_and_as_many_as_asked_for(nbytes: int) -> None:
    memory = allocate_bytes(nbytes, CPU)
    assert memory.shape == (nbytes,)
    assert memory.dtype == torch.uint8
    assert memory.untyped_storage().nbytes() == nbytes
    assert nbytes == 0 or memory.data_ptr() % 256 == 0
    assert (memory == 0xFF).all(), "tests see poison where a program sees zeros"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child below touches no thread of its parent
def test_a_forked_process_does_not_write_its_parents_slots() -> None:
    memory = allocate_bytes(1, CPU).numpy()
    if not (child := os.fork()):
        memory[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert memory[0] == 0xFF


@pytest.mark.parametrize(
    ("slot_nbytes", "num_slots", "slots_of_segments"),
    [
        (256, 0, []),
        (256, 3, [1] * 3),
        (256, 8, [1] * 8),
        (256, 9, [1] * 9),
        (256, 100, [12] * 8 + [4]),
        (2**20, 600, [64] * 9 + [24]),  # a segment takes at most 64 MiB
        (24 * 2**20, 24, [2] * 12),
        (65 * 2**20, 3, [1] * 3),  # except where one slot is larger
    ],
)
def test_a_pool_grows_in_at_least_eight_segments_of_at_most_64_mib(
    monkeypatch: pytest.MonkeyPatch, slot_nbytes: int, num_slots: int, slots_of_segments: list[int]
) -> None:
    sizes = []

    def untouched(nbytes: int, device: torch.device) -> Tensor:
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)  # reserved, never filled

    monkeypatch.setattr(slab_pool, "allocate_bytes", untouched)
    pool = SlabPool(slot_nbytes, CPU, ManualFence())
    pool.grow(num_slots)
    assert [size // slot_nbytes for size in sizes] == slots_of_segments
    assert pool.num_slots == pool.num_available == num_slots
    assert pool.nbytes == num_slots * slot_nbytes


def test_slots_do_not_overlap() -> None:
    pool = new_pool(20)
    slots = list(iter(pool.allocate, None))
    for value, slot in enumerate(slots):
        slot.bytes.fill_(value)
    assert len(slots) == 20
    assert all((pool.at(slot.address) == value).all() for value, slot in enumerate(slots))


def test_the_surplus_is_the_segments_of_least_worth_and_the_newest_of_equals() -> None:
    pool = new_pool(16)  # eight segments of two
    first, *_, last = segments = [sorted(pool.surplus(n, {}) - pool.surplus(n + 2, {})) for n in range(0, 16, 2)]
    assert pool.surplus(16, {}) == pool.surplus(99, {}) == set()
    assert pool.surplus(15, {}) == pool.surplus(14, {}) == set(last)
    worth = {slot: 5.0 for segment in segments for slot in segment} | {first[0]: 1.0, first[1]: 2.0}
    assert pool.surplus(14, worth) == set(first)
    worth[last[0]] = 0.0
    assert pool.surplus(12, worth) == {*first, *last}
    assert pool.surplus(0, worth) == set().union(*segments)
    pool.grow(2)
    assert pool.surplus(16, {}).isdisjoint(first + last)


def test_dropping_returns_the_memory_and_keeps_the_rest() -> None:
    pool = SlabPool(2**20, CPU, ManualFence())
    pool.grow(64)
    held = psutil.Process().memory_info().rss
    kept = pool.surplus(0, {}) - (dropped := pool.surplus(16, {}))
    pool.drop(dropped)
    assert held - psutil.Process().memory_info().rss > 40 * 2**20
    assert pool.nbytes == 16 * 2**20
    assert {slot.address for slot in iter(pool.allocate, None)} == kept
    with pytest.raises(KeyError):
        pool.at(dropped.pop())


def test_dropping_waits_for_the_readers_of_its_own_slots_only() -> None:
    fence = ManualFence()
    pool = new_pool(2, fence)
    first, second = pool.allocate(), pool.allocate()
    older = fence.begin()
    pool.retire(first)
    later = fence.begin()
    pool.retire(second)
    pool.drop({first.address})
    assert fence.readers == {later}
    assert older not in fence.readers
    pool.drop({second.address})
    assert not fence.readers


def test_a_slot_is_given_back_once_and_never_dropped_while_owned() -> None:
    pool = new_pool(1)
    slot = pool.allocate()
    with pytest.raises(AssertionError, match="owned"):
        pool.drop({slot.address})
    pool.release(slot)
    with pytest.raises(AssertionError, match="once"):
        pool.retire(slot)
    assert pool.num_available == pool.num_slots == 1


def test_a_retired_slot_comes_back_when_its_readers_have_left_and_not_before() -> None:
    fence = ManualFence()
    pool = new_pool(1, fence)
    reader, slot = fence.begin(), pool.allocate()
    pool.retire(slot)
    assert pool.num_available == 1
    assert pool.allocate() is None
    fence.finish(reader)
    assert pool.allocate() is slot


def test_a_reader_whose_end_was_lost_is_none_as_soon_as_its_call_has_returned():
    fence = ReaderFence()

    def begins_and_never_ends() -> None:
        fence.reading().__enter__()
        assert not fence.passed(fence.mark())

    begins_and_never_ends()
    assert fence.passed(fence.mark())


def test_waiting_inside_a_reader_is_refused_at_once_whoever_else_reads():
    fence, begun, asked = ReaderFence(), threading.Event(), threading.Event()

    def read() -> bool:
        with fence.reading():
            begun.set()
            return asked.wait(SECONDS)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(read)
        assert begun.wait(SECONDS)
        with fence.reading(), pytest.raises(ReentryError, match="interrupted"):
            fence.wait(fence.mark())
        asked.set()
        assert other.result(), "it was refused only when the other reader had ended"


def test_what_is_fetched_is_written_by_no_one_else():
    words = HostMailbox(1, COUNT, CPU)
    table = ExpertTable(1, COUNT, CPU, words)
    table.publish(0, 2, 0x1200, 8)
    table.mend()
    assert not table.entries.any()
    assert words.table[0, 2] == 0x1208


def test_the_measured_link_is_that_of_a_machine() -> None:
    """Of bytes that were copied: no memory moves a terabyte per second past a CPU."""
    assert 1e8 < measure_link(torch.device("cpu")) < 1e12
