"""Recordings of what a model routes, one at a time. A recording that fails ends, and generation goes on.

The layers of a model may lie on several devices, each of which ticks by itself. A window is written once every device
has delivered its layers.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from dynaexq.errors import TraceError
from dynaexq.safeguards.call_lock import CallLock
from dynaexq.traces.trace_file import TraceHeader, TraceWindow, TraceWriter

logger = logging.getLogger(__name__)


class Routed(Protocol):
    """What one tick of one device has seen: mass `[L', E]` and tokens `[L']` of its layers."""

    @property
    def mass(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def steps(self) -> int: ...
    @property
    def top_k(self) -> int: ...


class Recording:
    """What `Runtime.trace` returns; it ends with `close()` or at the end of a `with` block.

    Args:
        rows: the numbers of the layers of each device.
    """

    def __init__(self, path: str | Path, header: TraceHeader, rows: Sequence[Sequence[int]]):
        self.path = Path(path)
        self._rows = rows
        self._lock = CallLock("the recording")
        self._pending: dict[int, TraceWindow] = {}
        self._writer: TraceWriter | None = TraceWriter(path, header)

    @property
    def closed(self) -> bool:
        """Whether recording has ended."""
        return self._writer is None

    def add(self, device: int, routed: Routed) -> None:
        """Take down one tick of a device, if it saw a token. A full disk ends the recording, and nothing else."""
        with self._lock.turn():
            if self._writer is None or not routed.tokens.any():
                return
            self._writer.header = replace(self._writer.header, top_k=routed.top_k)
            window = TraceWindow(routed.mass, routed.tokens, routed.steps)
            before = self._pending.get(device)
            self._pending[device] = window if before is None else before + window
            if len(self._pending) == len(self._rows):
                self._write()

    def mark(self, phase: str) -> None:
        """Let a phase of this name begin with the next tick, so that a replay can tell the workloads apart."""
        with self._lock.turn():
            if self._writer is not None:
                self._writer.mark(phase)

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        with self._lock.turn():
            if self._pending:
                self._write()
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def _write(self) -> None:
        """Write the window that the devices have delivered; layers of one that has not have seen nothing."""
        assert self._writer is not None, "recording goes on"
        shape = self._writer.header.shape
        mass, tokens, steps = np.zeros(shape), np.zeros(shape[0], dtype=np.int64), 0
        for device, window in self._pending.items():
            mass[self._rows[device]], tokens[self._rows[device]] = window.mass, window.tokens
            steps = max(steps, window.steps)
        self._pending = {}
        try:
            self._writer.add(TraceWindow(mass, tokens, steps))
        except OSError:
            logger.exception("the routing trace %s cannot be written any further and is given up", self.path)
            self._writer.abandon()
            self._writer = None

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Recorder:
    """Where the ticks of a model's devices are told: the recording that is running, if there is one."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._current: Recording | None = None

    def start(self, path: str | Path, header: TraceHeader) -> Recording:
        """Begin a recording; a TraceError while another one is running."""
        if self._current is not None and not self._current.closed:
            raise TraceError(f"{self._current.path} is still being recorded; close that recording first")
        self._current = Recording(path, header, self._rows)
        return self._current

    def listener(self, device: int) -> Callable[[Routed], None]:
        """What to call with every tick of a device."""

        def listen(routed: Routed) -> None:
            if self._current is not None:
                self._current.add(device, routed)

        return listen

    def close(self) -> None:
        """End the recording that is running."""
        if self._current is not None:
            self._current.close()
