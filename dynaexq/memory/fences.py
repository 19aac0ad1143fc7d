"""When has the last reader of a retired slot finished? One answer a device; it knows neither slots nor experts."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch


class Fence(Protocol):
    """Separates the readers that had begun at a moment from those that begin later."""

    def reading(self) -> AbstractContextManager[None]:
        """Round everything a reader does from looking at the table to its last read."""

    def writing(self) -> AbstractContextManager[None]:
        """Round a write that readers which begin later must find."""

    def mark(self) -> Any:
        """A ticket for this moment."""

    def passed(self, ticket: Any) -> bool:
        """Whether every reader that had begun before `ticket` has finished. Never waits."""

    def wait(self, ticket: Any) -> None:
        """Return once it has."""


class ReaderFence:
    """On a CPU a reader is a thread inside `reading()`. A ticket passes when all readers older than it have left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._clock = 0
        self._begun: set[int] = set()

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._clock += 1
            reader = self._clock
            self._begun.add(reader)
        try:
            yield
        finally:
            with self._changed:
                self._begun.remove(reader)
                self._changed.notify_all()

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> int:
        return self._clock

    def passed(self, ticket: int) -> bool:
        with self._changed:
            return self._oldest() > ticket

    def wait(self, ticket: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._oldest() > ticket)

    def _oldest(self) -> float:
        return min(self._begun, default=float("inf"))


class StreamFence:
    """On CUDA a reader is a kernel that was queued: stream order is the lock, and a ticket is an event behind it.

    The order is that of the stream which readers use. When they change to another, it waits, on the device, for the
    one before. While a graph is captured they stay where they were: a capture is no reader, and its replays run where
    the program lets them.
    """

    def __init__(self, device: torch.device | None = None):
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def reading(self) -> AbstractContextManager[None]:
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream and not torch.cuda.is_current_stream_capturing():
            if self._stream is not None:
                stream.wait_stream(self._stream)
            self._stream = stream
        return nullcontext()

    def writing(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream or torch.cuda.current_stream(self._device))
        return event

    def passed(self, ticket: torch.cuda.Event) -> bool:
        return ticket.query()

    def wait(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()


class ManualFence:
    """For tests: readers begin and finish when the test says so."""

    def __init__(self) -> None:
        self.clock = 0
        self.readers: set[int] = set()

    def begin(self) -> int:
        self.clock += 1
        self.readers.add(self.clock)
        return self.clock

    def finish(self, reader: int) -> None:
        self.readers.remove(reader)

    @contextmanager
    def reading(self) -> Iterator[None]:
        reader = self.begin()
        try:
            yield
        finally:
            self.finish(reader)

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> int:
        return self.clock

    def passed(self, ticket: int) -> bool:
        return min(self.readers, default=self.clock + 1) > ticket

    def wait(self, ticket: int) -> None:
        self.readers = {reader for reader in self.readers if reader > ticket}
