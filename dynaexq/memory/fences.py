"""When has the last reader of a retired slot finished? One answer a device; it knows neither slots nor experts."""

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch

from dynaexq.errors import ReentryError
from dynaexq.safeguards.call_lock import PAUSE, Call


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


class Reader(Call):
    """A call that reads, and the moment at which it began."""

    def __init__(self, moment: int, depth: int):
        super().__init__(depth + 1)
        self.moment = moment


class ReaderFence:
    """On a CPU a reader is a call inside `reading()`. A ticket passes when all readers older than it have ended.

    A reader is looked for on the stack of its thread, so that one whose end was lost (an interrupt, a fork) is none.
    """

    def __init__(self) -> None:
        self._clock = itertools.count()
        self._begun: set[Reader] = set()

    def reading(self) -> AbstractContextManager[None]:
        return _Reading(self)

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> int:
        return next(self._clock)

    def passed(self, ticket: int) -> bool:
        return not self._older(ticket)

    def wait(self, ticket: int) -> None:
        while readers := self._older(ticket):
            if any(reader.is_below for reader in readers):
                raise ReentryError(
                    "a forward was interrupted to ask for what waits until that forward has ended (a signal handler, "
                    "say, that lowers the budget); return from there first, then ask again"
                )
            time.sleep(PAUSE)

    def _older(self, ticket: int) -> list[Reader]:
        """Readers that began before `ticket` and go on; those that have ended are forgotten."""
        older = [reader for reader in list(self._begun) if reader.moment < ticket]
        running = [reader for reader in older if reader.is_running]
        self._begun.difference_update(set(older).difference(running))
        return running


class _Reading:
    """One reader of a `ReaderFence`."""

    def __init__(self, fence: ReaderFence):
        self._fence = fence

    def __enter__(self) -> None:
        self._reader = Reader(next(self._fence._clock), depth=1)
        try:
            self._fence._begun.add(self._reader)
        except BaseException:
            self._fence._begun.discard(self._reader)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fence._begun.discard(self._reader)


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
