"""How the device exchanges words with the host, in its plain form; see `memory.words` for what the words mean."""

from torch import Tensor

from dynaexq.types import EPOCH, FETCHED, FOUND, SEEN, STEPS, WORDS_AHEAD


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
