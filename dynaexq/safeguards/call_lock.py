"""A lock that is held for as long as the call that took it: it outlives no interrupt, no thread and no fork.

An exception may come between any two steps of Python (Ctrl-C does), also between the end of a block and the release of
its lock. A lock of `threading` is then held for ever. Here the holder is a call, known by its frame: once that frame
is on no thread's stack, the lock is free. Nothing is locked to find that out; each step is a single operation of a set
or a dict, which Python does not interrupt.
"""

import gc
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from dynaexq.errors import ReentryError

logger = logging.getLogger(__name__)

PAUSE = 0.0005
"""Seconds between two looks of a call that waits."""


class Call:
    """One call of a Python function, `depth` calls above the one that asks."""

    def __init__(self, depth: int = 1):
        self.thread: int = threading.get_ident()
        self._frame: FrameType = sys._getframe(depth + 1)

    @property
    def is_running(self) -> bool:
        """Whether it has not come to its end yet."""
        frame: FrameType | None = sys._getframe() if self.is_below else _top_frame(self.thread)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    @property
    def is_below(self) -> bool:
        """Whether it is on the stack of this very thread, so that waiting for its end would never end."""
        return self.thread == threading.get_ident()


def _top_frame(thread: int) -> FrameType | None:
    """Where a thread is; None if it has ended.

    Garbage is not collected meanwhile: before Python 3.12 that could come in the middle, while the interpreter's list
    of threads is locked, and a finalizer that waits for a thread would wait for ever.
    """
    collects = gc.isenabled()
    try:
        gc.disable()
        return sys._current_frames().get(thread)
    finally:
        if collects:
            gc.enable()


class CallLock:
    """A lock given to calls in the order in which they ask; not reentrant. `with lock.turn(): ...` holds it.

    Args:
        what: what it keeps apart, for the error message.
        mend: puts in order what a call has left behind that held the lock and ended by an exception. It is called
            before another call gets the lock, and must be able to follow upon an interruption of itself.
    """

    def __init__(self, what: str, mend: Callable[[], None] | None = None):
        self._what, self._mend = what, mend
        self._numbers = itertools.count()
        self._queue: dict[int, Call] = {}
        """Those that hold it (the first) or ask for it, in order: a dict keeps the order of its keys."""
        self._is_torn = False

    def locked(self) -> bool:
        """Whether a call holds it."""
        return self._first() is not None

    def turn(self, wait: bool = True) -> "Turn":
        """A block that holds it. Without `wait` it may not get it: `with lock.turn(wait=False) as taken: ...`.

        Raises:
            ReentryError: the call that holds it waits for this one to end; said instead of hanging.
        """
        return Turn(self, wait)

    def refuse_from_within(self) -> None:
        """Raise a ReentryError if the call that holds it waits for this one to end."""
        self._refuse_to_wait_below(self._first())

    def take(self, call: Call, wait: bool) -> int | None:
        """The number to `release` it by; None if another call holds it and `wait` is False."""
        number = next(self._numbers)
        try:
            self._queue[number] = call
            while (first := self._first()) != number:
                if not wait:
                    self.release(number)
                    return None
                self._refuse_to_wait_below(first)
                time.sleep(PAUSE)
            self.mend()
            self._is_torn = True
        except BaseException:
            self.release(number)
            raise
        return number

    def mend(self) -> None:
        """Put in order what the last holder has left behind, if it did not come to its end."""
        if self._is_torn and self._mend is not None:
            self._mend()
        self._is_torn = False

    def release(self, number: int | None) -> None:
        """Give it back; a second time does nothing."""
        self._queue.pop(number, None)  # type: ignore[arg-type]

    def finish(self, number: int | None, well: bool) -> None:
        """Give it back after the work is done, or mended."""
        try:
            if well:
                self._is_torn = False
            else:
                self.mend()
        except Exception:
            logger.exception("%s was cut short, and is put in order when it is next asked for", self._what)
        finally:
            self.release(number)

    def _first(self) -> int | None:
        """The number of the call that holds it; calls that have ended are forgotten."""
        for number, call in list(self._queue.items()):
            if call.is_running:
                return number
            self.release(number)
        return None

    def _refuse_to_wait_below(self, number: int | None) -> None:
        holder = self._queue.get(number)  # type: ignore[arg-type]
        if holder is not None and holder.is_below:
            raise ReentryError(
                f"{self._what} was asked for from within itself, by a policy, a listener or a signal handler that ran "
                "in the middle of it; return from there first, then ask again"
            )


class Turn:
    """One holding of a `CallLock`."""

    def __init__(self, lock: CallLock, wait: bool):
        self._lock, self._wait = lock, wait
        self._number: int | None = None

    def __enter__(self) -> bool:
        self._number = self._lock.take(Call(), self._wait)
        return self._number is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._number is not None:
            self._lock.finish(self._number, well=error is None)
