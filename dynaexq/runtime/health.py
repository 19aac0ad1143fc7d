"""Whether precision follows the traffic as it should, since when not, and why. It watches, and logs each change."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

OK, DEGRADED, STANDING_STILL = STATES = ("ok", "degraded", "standing still")
"""From good to bad. Degraded: some experts cannot be upgraded now. Standing still: none can."""


@dataclass(frozen=True)
class Health:
    """How precision management is doing. Whatever it is, the model answers, at the precisions it has.

    While a disk is away: `Health("standing still", 1.7e9, "no upgrade can be copied: cannot read ...", 9, 4, 0)`.

    Attributes:
        state: `"ok"`, `"degraded"` or `"standing still"`.
        since: when it came to that, in seconds since the epoch.
        why: a sentence; of a runtime that is ok, what holds it still by choice, if anything does.
        failed_copies: copies that have failed since the start.
        suspect_experts: experts whose last copy has failed, and which wait for another try.
        failed_ticks: ticks that have failed since the start.
    """

    state: str
    since: float
    why: str
    failed_copies: int = 0
    suspect_experts: int = 0
    failed_ticks: int = 0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # in a notebook

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.state} since {since}" + (f": {self.why}" if self.why else "")

    @classmethod
    def merged(cls, parts: Sequence["Health"]) -> "Health":
        """The worst of several devices, and all that was counted."""
        worst = max(parts, key=lambda part: (STATES.index(part.state), -part.since))
        return cls(
            worst.state,
            worst.since,
            worst.why,
            sum(part.failed_copies for part in parts),
            sum(part.suspect_experts for part in parts),
            sum(part.failed_ticks for part in parts),
        )


class HealthMonitor:
    """Remembers the state of one device, and logs each change of it once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._state, self._since = OK, time.time()

    def look(self, state: str, why: str, by_choice: bool = False, **counts: int) -> Health:
        """What is found now; what was chosen needs no warning."""
        if state != self._state:
            before, self._state, self._since = self._state, state, time.time()
            if state == OK:
                logger.info("precision on %s follows the traffic again, after it was %s", self._name, before)
            elif not by_choice:
                logger.warning("precision on %s is %s: %s", self._name, state, why)
        return Health(self._state, self._since, why, **counts)
