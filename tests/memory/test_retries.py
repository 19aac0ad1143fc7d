"""When what has failed is tried again, against the sentence that says so."""

import numpy as np
import pytest
import torch

from dynaexq.memory import EagerCopier, ExpertTable, ManualCopier, ManualFence, RamStore, SlabPool, SwapPipeline
from dynaexq.memory.retries import LONGEST_BAR, LONGEST_REST, Retries
from dynaexq.types import Transition

CPU = torch.device("cpu")
ERROR = OSError("out of reach")


def test_before_anything_fails_nothing_is_barred_and_there_is_nothing_to_say() -> None:
    retries = Retries((2, 3))
    assert not retries.barred.any()
    assert (retries.since, retries.last, retries.num_in_a_row, retries.num_suspect) == (None, "", 0, 0)
    assert retries.allowance is None


def test_one_expert_is_tried_after_1_tick_2_4_and_so_on() -> None:
    retries, waited = Retries((1, 2)), []
    for _ in range(13):
        retries.failed((0, 1), ERROR)
        start = retries.now
        while retries.barred[0, 1]:
            assert not retries.barred[0, 0]
            retries.tick()
        waited.append(retries.now - start)
    assert waited == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024, 1024]
    assert waited[-1] == LONGEST_BAR


def test_a_store_is_probed_after_1_tick_2_and_so_on_up_to_64() -> None:
    retries, rests = Retries((1, 16)), []
    for expert in range(9):
        retries.failed((0, expert), ERROR)
        start = retries.now
        while retries.allowance == 0:
            retries.tick()
        assert retries.allowance == 1
        rests.append(retries.now - start)
    assert rests == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert rests[-1] == LONGEST_REST


def test_what_fails_in_one_tick_is_one_probe() -> None:
    retries = Retries((1, 4))
    for expert in range(4):
        retries.failed((0, expert), ERROR)
    assert (retries.num_in_a_row, retries.num_suspect) == (4, 4)
    retries.tick()
    assert retries.allowance == 1


def test_the_first_failure_of_a_row_says_since_when_and_the_last_one_what(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 200.0, 300.0])
    monkeypatch.setattr("dynaexq.memory.retries.time.time", lambda: next(clock))
    retries = Retries((1, 4))
    retries.failed((0, 0), OSError("one"))
    retries.failed((0, 1), OSError("two"))
    assert (retries.since, retries.last) == (100.0, "two")
    retries.arrived((0, 2))
    assert retries.since is None
    retries.failed((0, 0), ERROR)
    assert retries.since == 200.0


def test_an_arrival_forgives_those_of_a_row_but_not_one_that_failed_alone() -> None:
    several = Retries((1, 4))
    for _ in range(3):
        several.failed((0, 0), ERROR)
        several.failed((0, 1), ERROR)
    several.arrived((0, 2))
    assert not several.barred.any()
    assert (several.num_suspect, several.num_in_a_row, several.allowance) == (0, 0, None)

    alone = Retries((1, 4))
    alone.failed((0, 0), ERROR)
    alone.failed((0, 0), ERROR)
    alone.arrived((0, 2))
    np.testing.assert_array_equal(alone.barred, [[True, False, False, False]])
    assert (alone.num_suspect, alone.allowance) == (1, None)
    alone.arrived((0, 0))
    assert not alone.barred.any()
    assert alone.num_suspect == 0
    alone.failed((0, 0), ERROR)
    assert alone._due[0, 0] == alone.now + 1, "its pauses begin anew"


def new_pipeline(copier) -> SwapPipeline:
    pool = SlabPool(512, CPU, ManualFence())
    pool.grow(4)
    return SwapPipeline(ExpertTable(1, 8, CPU), pool, RamStore(8, 512), copier, kind=8)


def test_a_probe_in_flight_is_the_only_one() -> None:
    pipeline = new_pipeline(ManualCopier())
    assert pipeline.allowance is None
    pipeline.retries.failed((0, 0), ERROR)
    assert pipeline.allowance == 0
    pipeline.tick()
    assert pipeline.allowance == 1
    assert pipeline.submit(Transition(0, 1, promote=True))
    assert pipeline.allowance == 0


def test_mending_tells_the_device_again_what_is_published() -> None:
    pipeline = new_pipeline(EagerCopier())
    pipeline.submit(Transition(0, 1, promote=True))
    pipeline.settle()
    pipeline.table._published = pipeline.table.entries.numpy().copy()  # as where a GPU has words of its own
    pipeline.table.entries.zero_()
    pipeline.mend()
    assert pipeline.table.entries.numpy().tolist() == pipeline.table._published.tolist()


def test_mending_waits_for_a_copier_only_where_a_flight_has_no_copy_yet() -> None:
    class Waiting(EagerCopier):
        waits = 0

        def synchronize(self) -> None:
            self.waits += 1

    pipeline = new_pipeline(copier := Waiting())
    pipeline.submit(Transition(0, 1, promote=True))
    pipeline.mend()
    assert copier.waits == 0
    pipeline._in_flight[0, 1].copy = None
    pipeline.mend()
    assert copier.waits == 1
    assert pipeline.num_in_flight == 0


def test_who_is_to_have_a_slot_that_is_still_read_waits_in_line() -> None:
    pipeline = new_pipeline(EagerCopier())
    for expert in range(4):
        assert pipeline.submit(Transition(0, expert, promote=True))
    pipeline.settle()
    assert not pipeline.submit(Transition(0, 4, promote=True)), "no slot is to become free"
    reader = pipeline.pool.fence.begin()
    assert pipeline.submit(Transition(0, 0, promote=False))
    assert pipeline.submit(Transition(0, 4, promote=True))
    assert not pipeline.submit(Transition(0, 5, promote=True)), "the slot is promised"
    pipeline.settle()
    assert pipeline.table.kinds()[0].tolist() == [0, 8, 8, 8, 0, 0, 0, 0], "a reader may still be there"
    pipeline.pool.fence.finish(reader)
    pipeline.settle()
    assert pipeline.table.kinds()[0].tolist() == [0, 8, 8, 8, 8, 0, 0, 0]


def test_who_waits_in_line_is_given_up_when_the_pipeline_ends() -> None:
    pipeline = new_pipeline(EagerCopier())
    for expert in range(4):
        pipeline.submit(Transition(0, expert, promote=True))
    pipeline.settle()
    pipeline.pool.fence.begin()
    pipeline.submit(Transition(0, 0, promote=False))
    pipeline.submit(Transition(0, 4, promote=True))
    pipeline.close()
    assert pipeline.num_in_flight == 0
    assert not pipeline.upgraded[0, 4]


def test_settling_frees_what_was_retired_and_not_only_waits() -> None:
    pipeline = new_pipeline(EagerCopier())
    pipeline.submit(Transition(0, 1, promote=True))
    pipeline.settle()
    pipeline.pool.fence.begin()
    pipeline.keep(np.zeros((1, 8), dtype=bool))
    assert not pipeline.pool._retired
    assert len(pipeline.pool._free) == 4
