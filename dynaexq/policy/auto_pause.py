"""Whether it is worth it here: watches what upgrades remove, and says when to hold still. It moves nothing itself."""

import numpy as np

from dynaexq.policy.benefit import Average, Stance, Verdict, is_worth_it
from dynaexq.settings import Settings

ADVANTAGE_HALF_LIFE = 256.0
"""Tokens over which the advantage of following is averaged: short, as a pause must end soon after a shift."""

LEAST_PATIENCE = 4096
"""Tokens without an advantage before moves are paused; eight half-lives of the hotness, if that is more."""


class AutoPause:
    """Judge sets of experts by the traffic after they were chosen; pause `policy="topn"` where following does not pay.

    Args:
        gain: `[L, E]`, the error that the upgrade removes from each expert.
    """

    def __init__(self, gain: np.ndarray, settings: Settings):
        self._gain = gain
        self._may_pause = settings.policy == "topn" and settings.auto_pause
        self._stance = Stance(paused=self._may_pause)
        self._patience = max(LEAST_PATIENCE, int(8 * (settings.half_life or 0)))
        self._tokens = 0
        self._coverage = self._removed = self._removed_by_start = Average()
        self._start: np.ndarray | None = None
        self._standing: np.ndarray | None = None
        self._followed: np.ndarray | None = None

    @property
    def paused(self) -> bool:
        """Whether upgrades should stay where they are."""
        return self._stance.paused

    def observe(self, mass: np.ndarray, tokens: np.ndarray, held: np.ndarray, top_k: int) -> None:
        """Take in one window: mass `[L, E]`, tokens `[L]`, and the experts `held [L, E]` that it met upgraded."""
        seen = int(tokens.max(initial=0))
        removable = mass * self._gain
        total = float(removable.sum())
        if self._start is None:
            self._start = held.copy()
        if not seen or total <= 0:
            return
        self._tokens += seen
        keep = 0.5 ** (seen / self._patience)
        self._coverage = self._coverage.add(float(mass[held].sum()) / float(mass.sum()), keep)
        self._removed = self._removed.add(float(removable[held].sum()) / total, keep)
        self._removed_by_start = self._removed_by_start.add(float(removable[self._start].sum()) / total, keep)
        if self._followed is None or self._standing is None:
            return
        won = float(removable[self._followed & ~self._standing].sum()) / total
        lost = float(removable[self._standing & ~self._followed].sum()) / total
        if self.paused and won + lost == 0:
            return  # nothing else is wanted yet; counted, it would delay the end of the pause
        # Each of the choices falls into one of the two sets with these chances, or into neither (Poisson).
        variance = (won + lost) / (int(tokens.sum()) * top_k)
        self._stance = self._stance.observed(won - lost, seen, 0.5 ** (seen / ADVANTAGE_HALF_LIFE), variance)

    def review(self, followed: np.ndarray, held: np.ndarray, frozen: bool) -> None:
        """Decide whether to hold still.

        Args:
            followed: `[L, E]`, what following the traffic would upgrade now.
            held: `[L, E]`, what is upgraded, or on its way.
            frozen: the sets stand still for another reason; then following is only compared.
        """
        before = self._stance
        if self._may_pause and not frozen:
            self._stance = before.reviewed(self._patience)
        if frozen or self.paused:
            self._standing = held.copy()
        elif self._standing is None or self._stance is not before:
            self._standing = followed.copy()
        self._followed = followed

    def verdict(self, upgraded: np.ndarray, frozen: bool) -> Verdict:
        """Is it worth it here, with the experts `upgraded [L, E]`?"""
        even, removed = float(upgraded.mean()), self._removed.mean
        return Verdict(
            worth_it=is_worth_it(removed, even) if self._tokens >= LEAST_PATIENCE else None,
            following=not (frozen or self.paused),
            tokens=self._tokens,
            needed=LEAST_PATIENCE,
            even=even,
            coverage=self._coverage.mean,
            removed=removed,
            removed_by_start=self._removed_by_start.mean,
            advantage=self._stance.advantage.mean,
        )
