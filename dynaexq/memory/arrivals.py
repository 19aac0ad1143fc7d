"""Has a copy arrived? Read off a word of host memory, so that asking is no CUDA call and disturbs no capture.

Behind each copy its last 8 bytes are copied back, on the same stream, into a page-locked word of its own. The word
starts as their complement and differs from them in every bit, so it equals them only when all 8 have come back, and
then, in the order of the stream, everything before them has arrived. (A flag would need a word on the device to copy
it from.)
"""

import torch
from torch import Tensor

from dynaexq.memory.pinned import PageLocked
from dynaexq.memory.slab_pool import allocate_bytes

WORDS_PER_PAGE = 4096


class Arrival:
    """What one copy waits for. `word` int64 `[1]`, page-locked, is to receive the copy's last 8 bytes."""

    def __init__(self, word: Tensor, expected: int, free: list[Tensor]):
        self.word, self._expected, self._free = word, expected, free

    def has_come(self) -> bool:
        """Whether it has; after a True the word belongs to others, and this object has served."""
        if int(self.word) != self._expected:
            return False
        self._free.append(self.word)
        return True


class Arrivals:
    """Words for any number of copies on their way.

    Args:
        locked: False where host and device are the same, as in tests.
    """

    def __init__(self, locked: bool = True):
        self._is_locked = locked
        self._pages: list[PageLocked] = []
        self._free: list[Tensor] = []

    def reserve(self) -> None:
        """Make sure of words for a copy. Raises StoreError."""
        if self._free:
            return
        nbytes = 8 * WORDS_PER_PAGE
        if self._is_locked:
            self._pages.append(PageLocked(nbytes))
            memory = self._pages[-1].bytes
        else:
            memory = allocate_bytes(nbytes, torch.device("cpu"))
        self._free.extend(memory.view(torch.int64).split(1))

    def expect(self, source: Tensor) -> Arrival:
        """A word that waits for the last 8 bytes of uint8 `source`, which lies in host memory. Raises StoreError."""
        self.reserve()
        expected = int(last_word(source))
        word = self._free.pop()
        word.fill_(~expected)
        return Arrival(word, expected, self._free)


def last_word(data: Tensor) -> Tensor:
    """The last 8 bytes of uint8 `data [8 n]` as int64 `[1]`, in place."""
    return data[-8:].view(torch.int64)
