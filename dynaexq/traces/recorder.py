"""Recordings of what a model routes, one at a time. They are told of every drain; if one fails, generation goes on."""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from dynaexq.errors import TraceError
from dynaexq.traces import TraceHeader, TraceWriter, Window

logger = logging.getLogger(__name__)


class Recording:
    """What `Runtime.trace` returns; it ends with `close()` or at the end of a `with` block."""

    def __init__(self, path: str | Path, header: TraceHeader):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._writer: TraceWriter | None = TraceWriter(path, header)

    @property
    def closed(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._writer is None

    def add(self, mass: np.ndarray, tokens: np.ndarray, steps: int, top_k: int) -> None:
        """Take down one drain, if it saw a token. A disk that is full ends the recording, and nothing else."""
        with self._lock:
            if self._writer is None or not tokens.any():
                return
            try:
                self._writer.header = replace(self._writer.header, top_k=top_k)
                self._writer.add(Window(mass, tokens, steps))
            except OSError:
                logger.exception("the routing trace %s cannot be written any further and is given up", self.path)
                self._writer = None

    def mark(self, phase: str) -> None:
        """Let a phase of this name begin with the next tick, so that a replay can tell the workloads apart."""
        with self._lock:
            if self._writer is not None:
                self._writer.mark(phase)

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        with self._lock:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Recorder:
    """Where a runtime's drains go: to the recording that is running, if there is one."""

    def __init__(self) -> None:
        self._current: Recording | None = None

    def start(self, path: str | Path, header: TraceHeader) -> Recording:
        """Begin a recording; a TraceError while another one is running."""
        if self._current is not None and not self._current.closed:
            raise TraceError(f"{self._current.path} is still being recorded; close that recording first")
        self._current = Recording(path, header)
        return self._current

    def add(self, mass: np.ndarray, tokens: np.ndarray, steps: int, top_k: int) -> None:
        """One drain: mass `[L, E]` and tokens `[L]` of `steps` forwards, each token routed to `top_k` experts."""
        if self._current is not None:
            self._current.add(mass, tokens, steps, top_k)

    def close(self) -> None:
        """End the recording that is running."""
        if self._current is not None:
            self._current.close()
