"""How many threads a call of the kernel gets: all of PyTorch's, but fewer while other programs want the cores.

A call ends when its last thread has. Where another program runs on a core, a thread that has lost it is waited for:
milliseconds for a layer that takes one. The kernel measures what its caller has waited or stood still for; where that
is most of the time, the team shrinks, rests so for a while, and then tries all threads again, after growing pauses.
Results do not depend on the number of threads. It computes nothing.
"""

import time
from collections.abc import Callable

import torch

SHARE_LOST = 0.5
"""Of the time of recent calls; beyond that the team shrinks."""

SECONDS_LOST = 0.01
"""In recent calls, at least: one pause of a few milliseconds is no program that wants the core."""

KEEP = 0.95
"""What remains of the past with each call."""

PAUSE, LONGEST_PAUSE = 0.25, 16.0
"""Seconds until all threads are tried again, at first and at most."""

GOOD_SECONDS = 0.1
"""Seconds of calls with all threads after which all is well again."""


class Team:
    """The threads of one process.

    Args:
        available: how many there are.
        clock: seconds since some moment.
    """

    def __init__(
        self, available: Callable[[], int] = torch.get_num_threads, clock: Callable[[], float] = time.monotonic
    ):
        self._available, self._clock = available, clock
        self._missing, self._until, self._pause = 0, 0.0, PAUSE
        self._took = self._lost = self._good = 0.0

    @property
    def size(self) -> int:
        """Threads for the next call."""
        if self._missing and self._clock() >= self._until:
            self._missing, self._took, self._lost, self._good = 0, 0.0, 0.0, 0.0
        return max(1, self._available() - self._missing)

    def observe(self, took: float, lost: float) -> None:
        """One call on several threads took so many seconds, of which its caller waited or stood still for `lost`."""
        self._took, self._lost = KEEP * self._took + took, KEEP * self._lost + lost
        self._good += took
        if self._lost > SECONDS_LOST and self._lost > SHARE_LOST * self._took:
            size = self.size
            self._missing += max(1, size // 4)
            self._until = self._clock() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._took = self._lost = self._good = 0.0
        elif not self._missing and self._good > GOOD_SECONDS:
            self._pause = PAUSE

    def __str__(self) -> str:
        size, available = self.size, self._available()
        return f"{size} of {available}" + (", as other programs use the cores" if size < available else "")


team = Team()
"""That of this process."""
