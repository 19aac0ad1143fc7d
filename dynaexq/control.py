"""The two halves of control: what the traffic looks like, and what to do about it.

`HotnessTracker` turns the device's counts into a moving average. `PrecisionController` turns that average into moves,
through the pure functions of `policy`. Neither touches memory.
"""

import numpy as np

from dynaexq.errors import SettingsError
from dynaexq.memory import RoutingCounter
from dynaexq.policy import (
    decay_by_tokens,
    prior_hotness,
    slots_per_row,
    threshold,
    top_n,
    transitions,
    update_hotness,
)
from dynaexq.records import Transition
from dynaexq.settings import Settings

_NEVER_BEATEN = 1e12  # a margin that lets no newcomer in, whatever its score


class HotnessTracker:
    """Device counter and the moving average of its differences, `hotness [L, E]`."""

    def __init__(self, counter: RoutingCounter, settings: Settings):
        self.counter = counter
        self.hotness = prior_hotness(counter.sums.shape[0], counter.num_experts)
        self._settings = settings

    def update(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Take in what was counted over the last `steps` forwards; returns that mass `[L, E]` and tokens `[L]`."""
        mass, tokens = self.counter.drain()
        if self._settings.alpha is not None:
            keep = np.full(len(tokens), self._settings.alpha**steps)
        else:
            assert self._settings.half_life is not None, "settings fill in one of the two"
            keep = decay_by_tokens(tokens, self._settings.half_life)
        self.hotness = update_hotness(self.hotness, mass, tokens, keep)
        return mass, tokens


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
        upgraded: np.ndarray,
        broken: np.ndarray,
        num_slots: int,
        free_slots: int,
        max_promotions: int,
    ) -> list[Transition]:
        """The moves of one tick, given who is `upgraded`, or on the way there, and whose bytes are `broken`."""
        lost = broken & ~upgraded
        score = np.where(lost, -1.0, self.score(hotness))
        wanted = self._wanted(score, upgraded, num_slots, hotness) & ~lost
        free = self._free_slots(upgraded, num_slots, free_slots)
        return transitions(score, upgraded, wanted, free, max_promotions)

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
        slots = slots_per_row(settings.allocation, num_slots, len(score))
        rows = (len(slots), -1)
        args = (score.reshape(rows), upgraded.reshape(rows), slots)
        if settings.policy == "threshold":
            assert settings.tau_h is not None, "settings ask for both thresholds"
            assert settings.tau_c is not None, "settings ask for both thresholds"
            wanted = threshold(*args, hotness.reshape(rows), settings.tau_h, settings.tau_c)
        else:
            wanted = top_n(*args, settings.margin)
        return wanted.reshape(score.shape)


def _checked(wanted: object, score: np.ndarray, num_slots: int) -> np.ndarray:
    wanted = np.asarray(wanted)
    if wanted.shape != score.shape or wanted.dtype != bool or wanted.sum() > num_slots:
        raise SettingsError(
            f"the policy must return at most {num_slots} True in a bool array {score.shape}, "
            f"got {wanted.dtype} {wanted.shape} with {np.count_nonzero(wanted)} set"
        )
    return wanted
