"""Whether changing precisions pays: how skewed the traffic is, how much it drifts, when to hold still. No arrays here.

Two questions, in the share of all removable error (hotness x gain) that a set of experts removes:

- *Is a mix of precisions worth it?* The held set against as many experts chosen evenly.
- *Is following worth it?* The set that the rule wants now against one that stood still, judged by traffic that neither
  had seen when it was chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WORTHWHILE_LIFT = 0.1
"""Least share of what an even choice leaves that the held set must remove for a mix to be called worth it."""

RESUME_ABOVE, PAUSE_BELOW = 0.02, 0.005
"""Advantage of following, in shares of the removable error, that ends a pause, and below which one begins."""

STANDARD_ERRORS, CHANCE_ERRORS = 2.0, 4.0
"""How many standard errors from zero an advantage must lie to end a pause, those that its windows show and those that
chance explains: flat traffic must not end one, and after a shift the first windows of few differ for good reason."""


@dataclass(frozen=True)
class Average:
    """A moving average that starts empty, and the doubt about it, from windows of different weight.

    Attributes:
        chance: variance of `total` that chance alone explains.
    """

    total: float = 0.0
    total_square: float = 0.0
    weight: float = 0.0
    weight_square: float = 0.0
    chance: float = 0.0

    def add(self, value: float, keep: float, variance: float = 0.0) -> "Average":
        """The average with `value` taken in; what came before keeps the share `keep` of its weight.

        Args:
            variance: what `value` varies by if only chance is at work.
        """
        new = 1 - keep
        return Average(
            keep * self.total + new * value,
            keep * self.total_square + new * value**2,
            keep * self.weight + new,
            keep**2 * self.weight_square + new**2,
            keep**2 * self.chance + new**2 * variance,
        )

    @property
    def mean(self) -> float:
        """The weighted mean; 0 before anything was added."""
        return self.total / self.weight if self.weight else 0.0

    @property
    def doubt(self) -> float:
        """How far from zero the mean may lie for no reason, were the windows independent."""
        if not self.weight:
            return 0.0
        variance = max(0.0, self.total_square / self.weight - self.mean**2)
        shown, chance = math.sqrt(variance * self.weight_square), math.sqrt(self.chance)
        return max(STANDARD_ERRORS * shown, CHANCE_ERRORS * chance) / self.weight


@dataclass(frozen=True)
class Stance:
    """Whether moves are paused, and what is known since that was last reviewed. Nothing moves until it would pay.

    Attributes:
        tokens: seen since the last review.
        advantage: of following over standing still, since then.
    """

    paused: bool = True
    tokens: int = 0
    advantage: Average = field(default_factory=Average)

    def observed(self, advantage: float, tokens: int, keep: float, variance: float) -> "Stance":
        """The same stance after `tokens` more, over which following was better by `advantage`; see `Average.add`."""
        return Stance(self.paused, self.tokens + tokens, self.advantage.add(advantage, keep, variance))

    def reviewed(self, patience: int) -> "Stance":
        """The stance to take from here on; another one, with nothing known, where there was reason for a review.

        Moves are paused only after `patience` tokens over whose last part following has not paid, and resumed as soon
        as it clearly would. So the end of a pause and the next are at least `patience` tokens apart.
        """
        found = self.advantage
        if self.paused:
            pays = found.mean > max(RESUME_ABOVE, found.doubt)
            return Stance(paused=False) if pays else self
        if self.tokens < patience:
            return self
        return Stance(paused=found.mean < PAUSE_BELOW)


@dataclass(frozen=True)
class Verdict:
    """Whether a mix of precisions is worth it here. Shares lie in [0, 1]; `str()` is the answer in words.

    Examples:
        >>> shares = {"even": 0.2, "coverage": 0.5, "removed": 0.6, "removed_by_start": 0.3, "advantage": 0.1}
        >>> verdict = Verdict(worth_it=True, following=True, tokens=9000, needed=4096, **shares)
        >>> round(verdict.lift, 2), str(verdict)[:53]
        (0.5, 'Worth it: the upgraded 20% of the experts remove 60% ')

    Attributes:
        worth_it: whether a mix of precisions beats an even choice; None while too little was seen.
        following: whether the traffic is being followed; False while moves are paused or frozen.
        tokens: seen so far, of the `needed` ones.
        even: share of the experts that is upgraded, and so of the traffic that an even choice meets.
        coverage: share of the recent routing mass that met an upgraded expert.
        removed: share of the removable error, routing mass times gain, that the upgrades removed.
        removed_by_start: what the choice made at the start would have removed of the same.
        advantage: what following removes beyond a set that stands still.
    """

    worth_it: bool | None
    following: bool
    tokens: int
    needed: int
    even: float
    coverage: float
    removed: float
    removed_by_start: float
    advantage: float

    @classmethod
    def merged(cls, verdicts: Sequence["Verdict"], weights: Sequence[float]) -> "Verdict":
        """The verdict on a model from those on its parts, shares weighed by `weights`, such as numbers of layers."""
        first, total = verdicts[0], sum(weights)

        def mean(share: str) -> float:
            return sum(getattr(v, share) * weight for v, weight in zip(verdicts, weights, strict=True)) / total

        shares = {name: mean(name) for name in ("even", "coverage", "removed", "removed_by_start", "advantage")}
        tokens = max(verdict.tokens for verdict in verdicts)
        worth_it = is_worth_it(shares["removed"], shares["even"]) if tokens >= first.needed else None
        return cls(worth_it, any(v.following for v in verdicts), tokens, first.needed, **shares)

    @property
    def lift(self) -> float:
        """Share removed of what an even choice leaves: 0 for no skill, 1 for all (the skill score of forecasters)."""
        return lift(self.removed, self.even)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # in a notebook

    def __str__(self) -> str:
        if not 0 < self.even < 1:
            return "Nothing to decide: " + ("every expert is upgraded." if self.even else "no expert can be upgraded.")
        if self.worth_it is None:
            return f"Too early to tell: {self.tokens:,} of {self.needed:,} tokens were seen."
        facts = (
            f"the upgraded {self.even:.0%} of the experts remove {self.removed:.0%} of the error that upgrades can, "
            f"the choice made at the start {self.removed_by_start:.0%}, an even one {self.even:.0%}"
        )
        if not self.worth_it:
            held = "" if self.following else "; nothing moves"
            return f"Not worth it here: {facts}{held}. One precision for all experts serves as well."
        if self.following:
            return f"Worth it: {facts}."
        return f"Worth it, and holding still serves as well for now: {facts}."


def lift(removed: float, even: float) -> float:
    """`(removed - even) / (1 - even)`; 0 where everything is upgraded or nothing is."""
    return (removed - even) / (1 - even) if 0 < even < 1 else 0.0


def is_worth_it(removed: float, even: float) -> bool:
    """Whether a set that removes this share beats an even choice of as many experts by enough."""
    return lift(removed, even) >= WORTHWHILE_LIFT
