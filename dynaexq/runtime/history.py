"""What happened of late: coverage from tick to tick, and the moves with what they were chosen for. Bounded."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynaexq.policy.controller import Window
from dynaexq.types import Transition

MOMENTS, MOVES = 512, 128
"""How many ticks with traffic, and moves, are remembered."""


@dataclass(frozen=True)
class Moment:
    """One tick.

    Attributes:
        at: seconds since the epoch.
        tokens: seen by then, since the start.
        coverage: share of the routing mass since the tick before that met an upgraded expert.
        promotions: moves that began, demotions aside.
    """

    at: float
    tokens: int
    coverage: float
    promotions: int


@dataclass(frozen=True)
class Move:
    """One move that began.

    Attributes:
        at: seconds since the epoch.
        layer, expert: whose.
        promote: up, or down.
        hotness: what it was expected to get per token of the routing.
        score: that times the error its upgrade removes, which it was chosen for.
    """

    at: float
    layer: int
    expert: int
    promote: bool
    hotness: float
    score: float


class History:
    """The latest ticks and moves of one device."""

    def __init__(self) -> None:
        self.moments: deque[Moment] = deque(maxlen=MOMENTS)
        self.moves: deque[Move] = deque(maxlen=MOVES)
        self._tokens = 0

    def add(self, window: Window, begun: Sequence[Transition], hotness: np.ndarray, score: np.ndarray) -> None:
        """Remember one tick: what it saw, the moves it began, and `hotness` and `score [L, E]` that they follow."""
        now = time.time()
        self._tokens += int(window.tokens[0])
        for move in begun[-MOVES:]:
            key = move.layer, move.expert
            self.moves.append(Move(now, *key, move.promote, float(hotness[key]), float(score[key])))
        if window.tokens[0]:
            promotions = sum(move.promote for move in begun)
            self.moments.append(Moment(now, self._tokens, window.coverage, promotions))
