"""Limit the promotions per tick with a token bucket (Turner, 1986), so that copies leave room on the link."""

import time
from collections.abc import Callable

UNLIMITED_TICK_BYTES = 64 * 2**20
PROMPT_TOKENS_A_TICK = 32
"""A tick before a prompt may copy as if there had been one for each so many of its tokens, which take time as well."""


class CopyRateLimiter:
    """A token bucket of bytes: it fills at `rate`, holds one second's worth, and each promotion takes one slot.

    Args:
        rate: bytes per second, or None for 64 MiB a tick, times as many as a prompt that begins has 32 tokens.
        slot_nbytes: bytes of one promotion.
        clock: seconds since some moment, by default `time.monotonic`; a replayed trace brings its own.
    """

    def __init__(self, rate: float | None, slot_nbytes: int, clock: Callable[[], float] | None = None):
        self._rate, self._slot_nbytes, self._clock = rate, max(1, slot_nbytes), clock or time.monotonic
        self._allowance = float(self._slot_nbytes)
        self._last = self._clock()

    def promotions(self, prompt_tokens: int = 0) -> int:
        """Promotions allowed now; what is not used stays, up to one second's worth.

        Args:
            prompt_tokens: of the prompt that is about to be computed.
        """
        if self._rate is None:
            ticks = max(1, prompt_tokens // PROMPT_TOKENS_A_TICK)
            return max(1, ticks * UNLIMITED_TICK_BYTES // self._slot_nbytes)
        now = self._clock()
        most = max(self._rate, float(self._slot_nbytes))
        self._allowance = min(most, self._allowance + self._rate * (now - self._last))
        self._last = now
        return int(self._allowance // self._slot_nbytes)

    def spend(self, promotions: int) -> None:
        """Take the promotions that began out of the bucket."""
        self._allowance -= promotions * self._slot_nbytes
