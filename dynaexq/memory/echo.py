"""When may a slot be used again, where the host never learns that a reader began? When it hears an echo."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from dynaexq.memory.fences import Fence
from dynaexq.memory.graph_sync import HostWords


class EchoFence:
    """The fence of a device that fetches the table itself, forward by forward, eager or replayed.

    A ticket is an epoch, begun after a slot was taken out of the host's table. It passes when the device reports it,
    or a later one, in `seen`. Why nobody reads the slot from then on:

    1. Forwards, eager or replayed, run on the device one after the other; so fetches, reads and reports have an order.
    2. Let R be the report and F the last fetch before it. F took `fetched` from `found`, where the fetch before F had
       left it. So that one had found the epoch, and with it the store that took the slot out; F, which came later,
       fetched a table without the slot. So does every fetch after F.
    3. What was read before F is over. What is read after F, in that forward or any later one, with a fetch of its own
       or without (a backward pass), finds a table that F or a later fetch has left, and so not the slot.

    No order is asked of what happens within a fetch, and no bound on how late a report becomes visible: that only
    delays. Such a bound is what a bare count of ended forwards would need: counted from after the store, one more
    would do for readers that fetch if reports were visible at once, n + 1 more where n may be on their way. The echo
    comes with the second forward that begins after the store.

    Args:
        order: what keeps eager forwards one after the other when they change streams.
        fetch: have the device fetch now.
        synchronize: return when everything that was queued has ended, on whatever stream a replay runs.
    """

    def __init__(self, words: HostWords, order: Fence, fetch: Callable[[], None], synchronize: Callable[[], None]):
        self._words, self._order, self._fetch, self._synchronize = words, order, fetch, synchronize
        self._rested = 0

    def reading(self) -> AbstractContextManager[None]:
        return self._order.reading()

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()  # the host's table is written by the host

    def mark(self) -> int:
        return self._words.begin_epoch()

    def passed(self, ticket: int) -> bool:
        return max(self._rested, self._words.seen) >= ticket

    def wait(self, ticket: int) -> None:
        if self.passed(ticket):
            return
        epoch = self._words.epoch
        self._synchronize()  # no forward may ever come; and a fetch on its way may bring what it read long ago
        self._fetch()
        self._synchronize()
        self._rested = epoch
