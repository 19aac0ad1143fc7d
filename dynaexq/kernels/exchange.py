"""How the device exchanges words with the host: the plain form, and the choice of the one that a GPU captures.

See `memory.words` for what the words mean. Nothing here is told.
"""

import torch
from torch import Tensor

from dynaexq.kernels.dispatch import triton_runs
from dynaexq.records import EPOCH, FETCHED, FOUND, SEEN, STEPS, WORDS_AHEAD


class PlainExchange:
    """On tensors of one memory: what others must do. A CPU has no graphs and needs none; it serves as the truth."""

    def fetch(self, words: Tensor, entries: Tensor) -> None:
        """Copy the table in `words [*]` to `entries [L, E]`, `found` to `fetched`, the epoch to `found`."""
        words[FETCHED] = words[FOUND]
        words[FOUND] = words[EPOCH]
        entries.view(-1).copy_(words[WORDS_AHEAD:][: entries.numel()])

    def report(self, words: Tensor, sums: Tensor, steps: int) -> None:
        """Copy `fetched` to `seen` and `sums [L, E + 2]` to the counts, and add `steps`."""
        words[-sums.numel() :].copy_(sums.view(-1))
        words[STEPS] += steps
        words[SEEN] = words[FETCHED]


def exchange_for(device: torch.device, dtype: torch.dtype) -> PlainExchange | None:
    """What a model of this dtype on `device` exchanges words by, or None where no graph can be captured anyway."""
    if device.type != "cuda" or not triton_runs(device, dtype, dtype):
        return None
    from dynaexq.kernels.triton import TritonExchange  # only now: a CPU does without

    return TritonExchange()
