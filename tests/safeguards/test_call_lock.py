"""A lock that outlives no call: not one that an exception has ended at an unlucky line, no thread, no fork."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from dynaexq.errors import ReentryError
from dynaexq.safeguards.call_lock import Call, CallLock


def test_it_lets_one_in_at_a_time() -> None:
    lock, inside, most = CallLock("the test"), 0, 0

    def work() -> None:
        nonlocal inside, most
        with lock.turn() as taken:
            assert taken
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work) for _ in range(40)]:
            done.result()
    assert most == 1
    assert not lock.locked()


def test_who_does_not_wait_is_told() -> None:
    lock, may_leave = CallLock("the test"), threading.Event()

    def hold() -> None:
        with lock.turn():
            may_leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    while not lock.locked():
        time.sleep(0.001)
    with lock.turn(wait=False) as taken:
        assert not taken
    may_leave.set()
    thread.join()
    with lock.turn(wait=False) as taken:
        assert taken


GARBAGE = """
import gc, threading, weakref
from dynaexq.safeguards.call_lock import CallLock

class Knot:
    def __init__(self):
        self.itself = self
        weakref.finalize(self, lambda: (other.locked(), threading.Thread(target=int).start()))

other, lock, may_leave = CallLock("the other"), CallLock("the lock"), threading.Event()

def hold():
    with lock.turn(), other.turn():
        may_leave.wait(60)

thread = threading.Thread(target=hold)
thread.start()
while not other.locked():
    pass
gc.set_threshold(1)
for _ in range(300):
    Knot()
    lock.locked()
may_leave.set()
thread.join()
"""


def test_a_finalizer_in_the_middle_of_a_look_at_other_threads_does_not_hang() -> None:
    subprocess.run([sys.executable, "-c", GARBAGE], timeout=60, check=True)


def test_asking_from_within_is_a_sentence_and_no_hang() -> None:
    lock = CallLock("the control of the test")
    with lock.turn():
        with pytest.raises(ReentryError, match="the control of the test was asked for from within itself"):
            take(lock)
        with lock.turn(wait=False) as taken:
            assert not taken
    assert take(lock)


def take(lock: CallLock) -> bool:
    with lock.turn() as taken:
        return taken


def abandon(lock: CallLock) -> None:
    lock.take(Call(depth=0), wait=True)  # and nobody gives it back


def test_a_call_that_ended_without_giving_it_back_holds_nothing_and_is_mended_before_the_next() -> None:
    mended = []
    lock = CallLock("the test", lambda: mended.append(True))
    abandon(lock)
    assert not lock.locked()
    assert not mended
    assert take(lock)
    assert mended == [True]
    assert take(lock)
    assert mended == [True], "the last one came to its end"


def test_an_exception_mends_at_once_and_a_mend_that_fails_is_made_up_for() -> None:
    mended: list[str] = []

    def mend() -> None:
        mended.append("tried")
        if len(mended) == 1:
            raise OSError("by the test")

    lock = CallLock("the test", mend)
    with pytest.raises(ZeroDivisionError), lock.turn():
        _ = 1 / 0
    assert mended == ["tried"]
    assert take(lock)
    assert mended == ["tried", "tried"]


def test_a_thread_that_is_gone_holds_nothing() -> None:
    lock = CallLock("the test")
    thread = threading.Thread(target=abandon, args=(lock,))
    thread.start()
    thread.join()
    assert take(lock)


def test_a_child_is_not_kept_out_by_a_thread_of_its_parent() -> None:
    lock, may_leave = CallLock("the test"), threading.Event()

    def hold() -> None:
        with lock.turn():
            may_leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    while not lock.locked():
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        os._exit(0 if take(lock) else 1)
    assert os.waitpid(child, 0)[1] == 0
    may_leave.set()
    thread.join()


def test_no_line_of_it_can_be_interrupted_so_that_it_stays_held() -> None:
    lock, line = CallLock("the test"), 0
    while interrupted_at(line, lambda: take(lock)):
        assert take(lock), f"still held after an interrupt at line {line}"
        line += 1
    assert line > 10


def interrupted_at(number: int, act: Any) -> bool:
    """Call `act` with a KeyboardInterrupt at the line of this number that it executes; whether there were so many."""
    seen = -1
    before = sys.gettrace()

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt
        return local

    sys.settrace(lambda frame, event, argument: local)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
