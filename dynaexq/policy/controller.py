"""Control: what the traffic looks like, and what to do about it. The same code serves a model and a replayed trace.

`HotnessTracker` turns counts into a moving average. `PrecisionController` turns that average into moves, through the
pure functions of `policy`. `ControlLoop` joins them to the rate limit and to auto-pause. None of them touches memory.
"""

import numpy as np

from dynaexq.errors import SettingsError
from dynaexq.policy.auto_pause import AutoPause
from dynaexq.policy.benefit import Verdict
from dynaexq.policy.hotness import HotnessTracker
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.policy.selection import slots_per_row, threshold, top_n, transitions
from dynaexq.settings import Settings
from dynaexq.types import Transition

_NEVER_BEATEN = 1e12  # a margin that lets no newcomer in, whatever its score


class PrecisionController:
    """Who deserves the upgrade: `score = hotness * gain`, a rule, and moves under a limit.

    Args:
        gain: `[L, E]`, the error that the upgrade removes from each expert.
    """

    def __init__(self, gain: np.ndarray, settings: Settings):
        self.gain = gain
        self._settings = settings

    def score(self, hotness: np.ndarray) -> np.ndarray:
        """Worth of an upgrade, `[L, E]`."""
        return hotness * self.gain

    def choose(
        self,
        hotness: np.ndarray,
        followed: np.ndarray,
        upgraded: np.ndarray,
        broken: np.ndarray,
        num_slots: int,
        free_slots: int,
        max_promotions: int,
    ) -> list[Transition]:
        """The moves of one tick, given who is `upgraded`, or on the way there, and whose bytes are `broken`.

        Args:
            followed: what `followed` made of the same.
        """
        lost = broken & ~upgraded
        score = np.where(lost, -1.0, self.score(hotness))
        wanted = followed if self._settings.policy == "topn" else self._wanted(score, upgraded, num_slots, hotness)
        wanted = wanted & ~lost
        free = self._free_slots(upgraded, num_slots, free_slots)
        return transitions(score, upgraded, wanted, free, max_promotions)

    def followed(self, hotness: np.ndarray, upgraded: np.ndarray, broken: np.ndarray, num_slots: int) -> np.ndarray:
        """The set `[L, E]` that following the traffic by `"topn"` would upgrade now, whatever the rule in force."""
        lost = broken & ~upgraded
        score = np.where(lost, -1.0, self.score(hotness))
        slots = slots_per_row(self._settings.allocation, num_slots, len(score))
        score_rows, upgraded_rows = (table.reshape(len(slots), -1) for table in (score, upgraded))
        wanted = top_n(score_rows, upgraded_rows, slots, self._settings.hysteresis)
        return wanted.reshape(score.shape) & ~lost

    def fill(
        self, hotness: np.ndarray, upgraded: np.ndarray, broken: np.ndarray, num_slots: int, free_slots: int
    ) -> list[Transition]:
        """Promotions that fill the free slots with the best experts, whatever the rule; nobody loses a slot."""
        score = np.where(broken, -1.0, self.score(hotness))
        slots = slots_per_row(self._settings.allocation, num_slots, len(score))
        rows = (len(slots), -1)
        wanted = top_n(score.reshape(rows), upgraded.reshape(rows), slots, _NEVER_BEATEN).reshape(score.shape)
        return transitions(score, upgraded, (wanted | upgraded) & ~(broken & ~upgraded), free_slots, free_slots)

    def _free_slots(self, upgraded: np.ndarray, num_slots: int, free_slots: int) -> int | np.ndarray:
        """Free slots of all layers together, or what each layer's share leaves it; negative where it holds more."""
        if callable(self._settings.policy) or self._settings.allocation == "global":
            return free_slots
        return slots_per_row("per_layer", num_slots, len(upgraded)) - upgraded.sum(1)

    def _wanted(self, score: np.ndarray, upgraded: np.ndarray, num_slots: int, hotness: np.ndarray) -> np.ndarray:
        settings = self._settings
        if settings.policy == "frozen":
            return upgraded
        if callable(settings.policy):
            return _checked(settings.policy(score, upgraded, num_slots), score, num_slots)
        assert settings.tau_h is not None, "settings ask for both thresholds"
        assert settings.tau_c is not None, "settings ask for both thresholds"
        slots = slots_per_row(settings.allocation, num_slots, len(score))
        score_rows, upgraded_rows, hotness_rows = (t.reshape(len(slots), -1) for t in (score, upgraded, hotness))
        wanted = threshold(score_rows, upgraded_rows, slots, hotness_rows, settings.tau_h, settings.tau_c)
        return wanted.reshape(score.shape)


class ControlLoop:
    """All that decides: counts come in, moves go out. Whoever owns the slots carries them out.

    Args:
        gain: `[L, E]`, the error that the upgrade removes from each expert.
        limit: how many promotions may start.
    """

    def __init__(self, tracker: HotnessTracker, gain: np.ndarray, limit: CopyRateLimiter, settings: Settings):
        self.tracker, self.limit = tracker, limit
        self.controller = PrecisionController(gain, settings)
        self.watch = AutoPause(gain, settings)
        self._policy = settings.policy

    def observe(self, steps: int, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take in the last `steps` forwards, which met the experts `held [L, E]` upgraded; returns mass and tokens."""
        mass, tokens = self.tracker.update(steps)
        self.watch.observe(mass, tokens, held, self.tracker.counter.top_k)
        return mass, tokens

    def decide(
        self, upgraded: np.ndarray, broken: np.ndarray, num_slots: int, free_slots: int, frozen: bool = False
    ) -> list[Transition]:
        """The moves of one tick; none while `frozen`, only promotions into empty slots while the watch has paused."""
        frozen = frozen or self._policy == "frozen"
        hotness, controller = self.tracker.hotness, self.controller
        followed = controller.followed(hotness, upgraded, broken, num_slots)
        self.watch.review(followed, upgraded, frozen)
        if frozen:
            return []
        allowed = self.limit.promotions()
        if self.watch.paused:
            return controller.fill(hotness, upgraded, broken, num_slots, free_slots)[:allowed]
        return controller.choose(hotness, followed, upgraded, broken, num_slots, free_slots, allowed)

    def verdict(self, upgraded: np.ndarray, frozen: bool = False) -> Verdict:
        """Is it worth it here, with the experts `upgraded [L, E]`?"""
        return self.watch.verdict(upgraded, frozen or self._policy == "frozen")


def _checked(wanted: object, score: np.ndarray, num_slots: int) -> np.ndarray:
    wanted = np.asarray(wanted)
    if wanted.shape != score.shape or wanted.dtype != bool or wanted.sum() > num_slots:
        raise SettingsError(
            f"the policy must return at most {num_slots} True in a bool array {score.shape}, "
            f"got {wanted.dtype} {wanted.shape} with {np.count_nonzero(wanted)} set"
        )
    return wanted
