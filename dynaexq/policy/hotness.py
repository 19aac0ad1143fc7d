"""How hot an expert is: a moving average of its share of the routing. Pure functions over numpy arrays.

Shapes: L layers, E experts per layer. An observation of N tokens in a layer is the selected routing mass per token,
`c[l, e] = (1 / N) * sum of p[l, t, e] over the tokens t that chose e`, zero for experts that none chose.
"""

import numpy as np

from dynaexq.policy.kinds import Arrival, LearnedKinds
from dynaexq.settings import Settings


def prior_hotness(num_layers: int, num_experts: int) -> np.ndarray:
    """Hotness `[L, E]` before anything was seen: every expert gets the same share of a token's unit of mass."""
    return np.full((num_layers, num_experts), 1.0 / num_experts)


def decay_by_tokens(tokens: np.ndarray, half_life: float) -> np.ndarray:
    """Share of the old hotness that is kept after `tokens [L]`: one half after `half_life` of them.

    Time is counted in tokens because a prefill of 2,048 tokens is not one decode step.
    """
    return np.exp2(-tokens / half_life)


def update_hotness(hotness: np.ndarray, mass: np.ndarray, tokens: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """`keep * hotness + (1 - keep) * mass / tokens`; layers that saw no token stay as they are.

    Args:
        hotness: `[L, E]`, the average so far.
        mass: `[L, E]`, routing mass summed over the tokens seen since.
        tokens: `[L]`, how many those were.
        keep: `[L]`, share of the old value to keep, as `decay_by_tokens` gives, or the paper's `alpha ** steps`.
    """
    observed = mass / np.maximum(tokens, 1)[:, None]
    keep = np.where(tokens > 0, keep, 1.0)[:, None]
    return keep * hotness + (1 - keep) * observed


class HotnessTracker:
    """The moving average of what was routed, whatever requests begin meanwhile.

    Args:
        shape: (L, E).

    Attributes:
        hotness: `[L, E]`, the moving average.
    """

    knows_requests = False
    """Whether it wants to be told where they begin."""

    def __init__(self, shape: tuple[int, int], settings: Settings):
        self.hotness = prior_hotness(*shape)
        self._settings = settings

    @property
    def expected(self) -> np.ndarray:
        """The hotness `[L, E]` to decide by."""
        return self.hotness

    @property
    def average(self) -> np.ndarray:
        """The hotness `[L, E]` to start another run from."""
        return self.hotness

    @property
    def learned(self) -> LearnedKinds | None:
        """The kinds of traffic seen so far, where they are told apart."""
        return None

    def start_from(self, hotness: np.ndarray, learned: LearnedKinds | None = None) -> None:
        """Take `hotness [L, E]` for what was seen; `learned` are the kinds that it is the average of, if known."""
        self.hotness = np.array(hotness, dtype=np.float64)

    def begin(self, arrival: Arrival) -> None:
        """Requests begin: their prompts are about to be routed."""

    def update(self, mass: np.ndarray, tokens: np.ndarray, steps: int) -> None:
        """Take in the routing of the last `steps` forwards: mass `[L, E]`, tokens `[L]`."""
        if self._settings.alpha is not None:
            keep = np.full(len(tokens), self._settings.alpha**steps)
        else:
            assert self._settings.half_life is not None, "settings fill in one of the two"
            keep = decay_by_tokens(tokens, self._settings.half_life)
        self.hotness = update_hotness(self.hotness, mass, tokens, keep)
