"""Words in page-locked host memory, read and written by kernels, so that a captured graph does it as well.

CUDA keeps naturally aligned accesses of 8 bytes to mapped host memory whole ("Mapped Memory" in its programming
guide), which it does not say of copies: no entry of the table is ever torn. Words that the host changes meanwhile are
read as volatile, which on a GPU means from the system and not from a cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaexq.memory.graph_sync import PlainExchange
from dynaexq.types import EPOCH, FETCHED, FOUND, SEEN, STEPS, WORDS_AHEAD

WORDS_PER_PROGRAM = 256  # many small programs: a read of host memory takes a microsecond, however few they are


class TritonExchange(PlainExchange):
    """The same as `PlainExchange`, one launch each. `words` are page-locked, the other tensors on the device."""

    def fetch(self, words: Tensor, entries: Tensor) -> None:
        count = entries.numel()
        with torch.cuda.device_of(entries):
            _fetch[(triton.cdiv(count, WORDS_PER_PROGRAM),)](
                words, entries, count, EPOCH, FOUND, FETCHED, WORDS_AHEAD, WORDS_PER_PROGRAM
            )

    def report(self, words: Tensor, sums: Tensor, steps: int) -> None:
        count = sums.numel()
        with torch.cuda.device_of(sums):
            _report[(triton.cdiv(count, WORDS_PER_PROGRAM),)](
                words, sums, count, len(words) - count, steps, FETCHED, SEEN, STEPS, WORDS_PER_PROGRAM
            )


@triton.jit(do_not_specialize=["count"])
def _fetch(
    words,
    entries,
    count,
    EPOCH: tl.constexpr,
    FOUND: tl.constexpr,
    FETCHED: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAM: tl.constexpr,
):
    place = tl.program_id(0) * PROGRAM + tl.arange(0, PROGRAM)
    entry = tl.load(words + AHEAD + place, mask=place < count, volatile=True)
    tl.store(entries + place, entry, mask=place < count)
    if tl.program_id(0) == 0:
        tl.store(words + FETCHED, tl.load(words + FOUND, volatile=True))
        tl.store(words + FOUND, tl.load(words + EPOCH, volatile=True))


@triton.jit(do_not_specialize=["count", "start", "steps"])
def _report(
    words,
    sums,
    count,
    start,
    steps,
    FETCHED: tl.constexpr,
    SEEN: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAM: tl.constexpr,
):
    place = tl.program_id(0) * PROGRAM + tl.arange(0, PROGRAM)
    tl.store(words + start + place, tl.load(sums + place, mask=place < count), mask=place < count)
    if tl.program_id(0) == 0:
        tl.store(words + STEPS, tl.load(words + STEPS, volatile=True) + steps)
        tl.store(words + SEEN, tl.load(words + FETCHED, volatile=True))
