"""When what has failed is tried again: soon at first, then at growing distances, all at once when it works again.

Copies fail for two reasons. The bytes of one expert are damaged: then it alone is left in peace, for 1 tick, 2, 4 and
so on. Or the store they come from is out of reach: then several experts fail in a row, all moves rest for growing
pauses, and after each pause one copy probes the store. The first copy that arrives ends that, and forgives the experts
that had failed in a row. Time is counted in ticks. It moves nothing and knows no reason.
"""

import time

import numpy as np

LONGEST_REST = 64
"""Ticks between two probes of a store, at most."""

LONGEST_BAR = 1024
"""Ticks until an expert is tried again, at most."""

Key = tuple[int, int]


class Retries:
    """Failures of copies, by expert and in a row.

    Attributes:
        now: ticks so far.
        since: when the copies began to fail that fail in a row, in seconds since the epoch; None while none does.
        last: what the last failure said.
    """

    def __init__(self, shape: tuple[int, int]):
        self.now = 0
        self.since: float | None = None
        self.last = ""
        self._failures = np.zeros(shape, dtype=np.int64)
        self._due = np.zeros(shape, dtype=np.int64)
        self._row: list[Key] = []
        self._rests, self._failed_at, self._probe_due = 0, -1, 0

    @property
    def barred(self) -> np.ndarray:
        """Experts not to be tried now, bool `[L, E]`."""
        return self._due > self.now

    @property
    def num_in_a_row(self) -> int:
        """Copies that have failed since the last that arrived."""
        return len(self._row)

    @property
    def num_suspect(self) -> int:
        """Experts whose last copy has failed."""
        return int(np.count_nonzero(self._failures))

    @property
    def allowance(self) -> int | None:
        """Copies that may begin now: None where nothing stands against it, 1 to probe the store, 0 while it rests."""
        if not self._row:
            return None
        return int(self.now >= self._probe_due)

    def tick(self) -> None:
        """Time passes."""
        self.now += 1

    def failed(self, key: Key, error: Exception) -> None:
        """The copy of this expert has failed."""
        self.last = str(error)
        if self.since is None:
            self.since = time.time()
        self._row.append(key)
        self._failures[key] += 1
        self._due[key] = self.now + _pause(int(self._failures[key]), LONGEST_BAR)
        self._rests += self._failed_at != self.now  # what fails together is one probe
        self._failed_at = self.now
        self._probe_due = self.now + _pause(self._rests, LONGEST_REST)

    def arrived(self, key: Key) -> None:
        """The copy of this expert has arrived."""
        if len(set(self._row)) > 1:  # the store had failed, and not they
            for one in self._row:
                self._failures[one] = self._due[one] = 0
        self._row, self.since, self._rests = [], None, 0
        self._failures[key] = self._due[key] = 0


def _pause(failures: int, longest: int) -> int:
    return min(2 ** min(failures - 1, 30), longest)
