"""When to tick: where Python runs a forward, in its first layer; where graphs are replayed, from a thread.

Nothing is decided here, and of the runtime only that it can be told to look whether a tick is due.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dynaexq.memory import DeviceMemory, leave_captures_alone
from dynaexq.safeguards.call_lock import CallLock

logger = logging.getLogger(__name__)

SECONDS_AWAKE, SECONDS_ASLEEP = 0.002, 0.05
"""Between two looks of the thread: while forwards end, and at most, when none has ended for a while."""


def is_capturing(device: torch.device) -> bool:
    """Whether what this thread queues now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


TOKENS_A_STEP = 8
"""A tick is due after `update_interval` forwards, or when they have seen this many times as many tokens: a prompt
says at once what a hundred steps of decoding say."""


class StepCount:
    """Forwards since the start, and since the last tick."""

    def __init__(self, memory: DeviceMemory, update_interval: int):
        self._memory, self.update_interval = memory, update_interval
        self._run_here = self._at_tick = self._tokens = 0
        self.postponed = 1
        """How many times the usual interval the next tick waits."""

    @property
    def total(self) -> int:
        """Those that Python has begun or, once graphs are replayed and that falls behind, those that have ended."""
        return max(self._run_here, self._memory.reported_steps)

    def add(self) -> None:
        """Python has begun one."""
        self._run_here += 1

    def add_tokens(self, tokens: int) -> None:
        """What it will see, which a tick before it knows nothing of."""
        self._tokens += tokens

    @property
    def is_due(self) -> bool:
        """Whether it is time for a tick."""
        steps = max(self.total - self._at_tick, self._tokens // TOKENS_A_STEP)
        return steps >= self.update_interval * self.postponed

    def postpone(self, times: int) -> None:
        """Let the next tick wait so many times the usual interval."""
        self.postponed = times

    def take(self) -> int:
        """How many since the last tick; the next one counts from here."""
        before, self._at_tick, self._tokens = self._at_tick, self.total, 0
        return self._at_tick - before


class Poller:
    """A thread that calls `look`, which returns how many forwards there were so far; from `start` until `stop`.

    It does not keep alive the object whose method `look` is, and ends with it.
    """

    def __init__(self, look: Callable[[], int]):
        self._look = weakref.WeakMethod(look)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = CallLock("the poller")

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, unless it was started before."""
        with self._starting.turn():
            if self._thread is None and not self._stop.is_set():
                arguments = self._look, self._stop
                self._thread = threading.Thread(target=_watch, args=arguments, name="dynaexq-poller", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread for good, and wait for it unless this is it."""
        self._stop.set()
        with self._starting.turn():
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()


def _watch(reference: "weakref.WeakMethod[Any]", stop: threading.Event) -> None:
    leave_captures_alone()
    seconds, steps = SECONDS_AWAKE, -1
    while not stop.wait(seconds):
        look = reference()
        if look is None:
            return
        before = steps
        try:
            steps = look()
        except Exception:
            logger.exception("precision stands still from now on while graphs are replayed")
            return
        del look  # for the time of the pause nothing here keeps the runtime alive
        seconds = SECONDS_AWAKE if steps != before else min(2 * seconds, SECONDS_ASLEEP)
