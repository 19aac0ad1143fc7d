"""How many promotions one tick may start, so that copies leave the link to those who compute."""

import time

import torch

from dynaexq.memory import allocate_bytes

UNLIMITED_TICK_BYTES = 64 * 2**20
_PROBE_BYTES = 32 * 2**20


class TrafficLimit:
    """An allowance of bytes that grows with time and is spent a slot at a time.

    Args:
        limit: bytes a second, a share in (0, 1] of the measured link, or None for 64 MiB a tick.
        slot_nbytes: bytes of one promotion.
    """

    def __init__(self, limit: int | float | str | None, slot_nbytes: int, device: torch.device):
        self._slot_nbytes = max(1, slot_nbytes)
        self._rate = limit * measure_link(device) if isinstance(limit, float) else limit
        self._allowance = float(self._slot_nbytes)
        self._last = time.monotonic()

    def promotions(self) -> int:
        """Promotions allowed now; what is not used stays, up to one second's worth."""
        if self._rate is None:
            return max(1, UNLIMITED_TICK_BYTES // self._slot_nbytes)
        now = time.monotonic()
        most = max(float(self._rate), float(self._slot_nbytes))
        self._allowance = min(most, self._allowance + float(self._rate) * (now - self._last))
        self._last = now
        return int(self._allowance // self._slot_nbytes)

    def spend(self, promotions: int) -> None:
        """Take what was really started off the allowance."""
        self._allowance -= promotions * self._slot_nbytes


def measure_link(device: torch.device) -> float:
    """Bytes a second from host memory to `device`, best of three copies of 32 MiB."""
    source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = allocate_bytes(_PROBE_BYTES, device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        best = min(best, time.perf_counter() - start)
    return _PROBE_BYTES / best
