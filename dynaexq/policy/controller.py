"""One tick of control: what was routed comes in, moves begin. A model and a replayed trace run the same code.

`PrecisionController` turns hotness into moves, through the pure functions of `selection`. `ControlLoop` joins it to
the hotness tracker, the rate limit and auto-pause. No memory is touched: what holds the slots is known as `Slots`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dynaexq.errors import SettingsError
from dynaexq.policy.auto_pause import AutoPause
from dynaexq.policy.benefit import Verdict
from dynaexq.policy.hotness import HotnessTracker
from dynaexq.policy.kinds import Arrival
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.policy.requests import RequestTracker
from dynaexq.policy.selection import slots_per_row, threshold, top_n, transitions
from dynaexq.settings import Settings
from dynaexq.types import Transition

_NEVER_BEATEN = 1e12  # a hysteresis that lets no newcomer in, whatever its score


@dataclass(frozen=True, eq=False)
class Window:
    """What was routed between two ticks, and which experts held an upgrade meanwhile.

    Two layers of three experts, after four decode steps of one sequence with two experts per token:

    >>> Window(
    ...     mass=np.array([[2.5, 1.0, 0.5], [0.0, 4.0, 0.0]]),
    ...     tokens=np.array([4, 4]),
    ...     steps=4,
    ...     top_k=2,
    ...     upgraded=np.array([[True, False, False], [False, True, False]]),
    ... ).coverage
    0.8125

    Attributes:
        mass: float `[L, E]`, routing weights summed over the tokens that chose the expert.
        tokens: int `[L]`, tokens that each layer saw.
        steps: forward passes.
        top_k: experts that each token was routed to.
        upgraded: bool `[L, E]`.
    """

    mass: np.ndarray
    tokens: np.ndarray
    steps: int
    top_k: int
    upgraded: np.ndarray

    @property
    def coverage(self) -> float:
        """Share of the routing mass that met an upgraded expert; 0 without any."""
        total = float(self.mass.sum())
        return float(self.mass[self.upgraded].sum()) / total if total else 0.0


class Slots(Protocol):
    """Upgrade slots and the moves into and out of them: the swap pipeline of a model, or what a replay imagines."""

    @property
    def upgraded(self) -> np.ndarray:
        """Experts that hold an upgrade or have one on its way, bool `[L, E]`."""

    @property
    def barred(self) -> np.ndarray:
        """Experts not to be tried now, as their last copy has failed, bool `[L, E]`."""

    @property
    def allowance(self) -> int | None:
        """Promotions that may begin now: None for any number, 1 to probe a store that failed, 0 while it rests."""

    @property
    def num_slots(self) -> int:
        """All slots."""

    @property
    def num_free(self) -> int:
        """Slots that no promotion is meant for: free, or to be free once their last reader has finished."""

    def submit(self, move: Transition) -> bool:
        """Begin one move, or have it wait for its slot; whether that was possible."""

    def tick(self) -> None:
        """Time passes for what waits to be tried again."""

    def settle(self) -> None:
        """Publish every upgrade whose bytes have arrived. Never waits."""

    def reclaim(self) -> None:
        """Free the slots whose last reader has finished. Never waits."""


class PrecisionController:
    """Who deserves the upgrade: `score = hotness * gain`, a rule, and moves under a limit.

    Args:
        gain: float `[L, E]`, the error that the upgrade removes from each expert.

    Attributes:
        pins: int8 `[L, E]`: 1 for an expert that must be upgraded, -1 for one that must not, else 0.
    """

    def __init__(self, gain: np.ndarray, settings: Settings):
        self.gain = gain
        self.pins = np.zeros(gain.shape, dtype=np.int8)
        self._settings = settings

    def score(self, hotness: np.ndarray) -> np.ndarray:
        """Worth of an upgrade, `[L, E]`."""
        return hotness * self.gain

    def ranked(self, hotness: np.ndarray) -> np.ndarray:
        """The scores `[L, E]`, with experts that are pinned before or behind all others."""
        return self._before_and_behind(self.score(hotness))

    def choose(self, hotness: np.ndarray, followed: np.ndarray, slots: Slots, max_promotions: int) -> list[Transition]:
        """The moves of one tick.

        Args:
            followed: what `followed` made of the same.
        """
        upgraded, lost = slots.upgraded, slots.barred & ~slots.upgraded
        score = np.where(lost, -1.0, self.score(hotness))
        if self._settings.policy == "topn":
            wanted = followed
        else:
            wanted = self._pinned(self._wanted(score, upgraded, slots.num_slots, hotness), score, slots.num_slots)
        return transitions(
            self._before_and_behind(score), upgraded, wanted & ~lost, self._free_slots(slots), max_promotions
        )

    def pin(self, key: tuple[int, int], pin: int, slots: Slots) -> list[Transition]:
        """Set one of `pins`; the moves that bring it about.

        Raises:
            SettingsError: every slot that the expert could have is pinned to another.
        """
        pins = self.pins.copy()
        pins[key] = pin
        rows = slots_per_row(self._settings.allocation, slots.num_slots, len(pins))
        pinned = (pins > 0).reshape(len(rows), -1).sum(1)
        if (pinned > rows).any():
            raise SettingsError(
                f"expert {key[1]} of layer {key[0]} cannot be pinned to its upgrade: all {int(rows.min())} slots that "
                "it could have are pinned to others; unpin one, or give a larger budget"
            )
        self.pins = pins
        upgraded = slots.upgraded
        if pin < 0:
            return [Transition(*key, promote=False)] if upgraded[key] else []
        if not pin or upgraded[key]:
            return []
        moves = [Transition(*key, promote=True)]
        if slots.num_free > 0:
            return moves
        row = np.arange(len(pins)) == key[0] if len(rows) > 1 else np.ones(len(pins), dtype=bool)
        leaving = np.flatnonzero(upgraded & (pins <= 0) & row[:, None])
        layer, expert = divmod(int(leaving[self.gain.ravel()[leaving].argmin()]), pins.shape[1])
        return [Transition(layer, expert, promote=False), *moves]

    def followed(self, hotness: np.ndarray, upgraded: np.ndarray, barred: np.ndarray, num_slots: int) -> np.ndarray:
        """The set `[L, E]` that following the traffic by `"topn"` would upgrade now, whatever the rule in force."""
        lost = barred & ~upgraded
        score = np.where(lost, -1.0, self.ranked(hotness))
        return self._best(score, upgraded, num_slots, self._settings.hysteresis) & ~lost & (self.pins >= 0)

    def fill(self, hotness: np.ndarray, slots: Slots) -> list[Transition]:
        """Promotions that fill the free slots with the best experts, whatever the rule; no expert loses a slot."""
        upgraded, barred = slots.upgraded, slots.barred
        score = np.where(barred, -1.0, self.ranked(hotness))
        wanted = self._best(score, upgraded, slots.num_slots, _NEVER_BEATEN)
        wanted = (wanted | upgraded) & ~(barred & ~upgraded) & (self.pins >= 0)
        return transitions(score, upgraded, wanted, slots.num_free, slots.num_free)

    def _best(self, score: np.ndarray, upgraded: np.ndarray, num_slots: int, hysteresis: float) -> np.ndarray:
        slots = slots_per_row(self._settings.allocation, num_slots, len(score))
        rows = (len(slots), -1)
        return top_n(score.reshape(rows), upgraded.reshape(rows), slots, hysteresis).reshape(score.shape)

    def _before_and_behind(self, score: np.ndarray) -> np.ndarray:
        """The scores with pinned experts before or behind all others."""
        return np.where(self.pins > 0, np.inf, np.where(self.pins < 0, -1.0, score))

    def _pinned(self, wanted: np.ndarray, score: np.ndarray, num_slots: int) -> np.ndarray:
        """`wanted` with what is pinned in it, and, where that is too much, without the worst of the others."""
        wanted = (wanted | (self.pins > 0)) & (self.pins >= 0)
        surplus = int(wanted.sum()) - num_slots
        if surplus > 0:
            others = np.flatnonzero(wanted & (self.pins == 0))
            wanted.ravel()[others[np.argsort(score.ravel()[others], kind="stable")][:surplus]] = False
        return wanted

    def _free_slots(self, slots: Slots) -> int | np.ndarray:
        """Free slots of all layers together, or what each layer's share leaves it; negative where it holds more."""
        if callable(self._settings.policy) or self._settings.allocation == "global":
            return slots.num_free
        upgraded = slots.upgraded
        return slots_per_row("per_layer", slots.num_slots, len(upgraded)) - upgraded.sum(1)

    def _wanted(self, score: np.ndarray, upgraded: np.ndarray, num_slots: int, hotness: np.ndarray) -> np.ndarray:
        settings = self._settings
        if callable(settings.policy):
            return _checked(settings.policy(score, upgraded, num_slots), score, num_slots)
        assert settings.tau_h is not None, "settings ask for both thresholds"
        assert settings.tau_c is not None, "settings ask for both thresholds"
        slots = slots_per_row(settings.allocation, num_slots, len(score))
        score_rows, upgraded_rows, hotness_rows = (t.reshape(len(slots), -1) for t in (score, upgraded, hotness))
        wanted = threshold(score_rows, upgraded_rows, slots, hotness_rows, settings.tau_h, settings.tau_c)
        return wanted.reshape(score.shape)


class ControlLoop:
    """All that decides, and the one place where a tick is told. `Slots` carry out what it decides.

    Args:
        shape: (layers, experts).
        gain: float `[L, E]`, the error that the upgrade removes from each expert.
        limit: how many promotions may begin.
    """

    def __init__(self, shape: tuple[int, int], gain: np.ndarray, limit: CopyRateLimiter, settings: Settings):
        self.tracker = tracker_for(shape, settings)
        self.controller = PrecisionController(gain, settings)
        self.auto_pause = AutoPause(gain, settings)
        self.limit = limit
        self._stands_still = settings.policy == "frozen"

    def step(
        self, window: Window, slots: Slots, frozen: bool = False, arrival: Arrival | None = None
    ) -> list[Transition]:
        """One tick: publish what has arrived, take in what was routed, decide, and begin the moves. Never waits.

        Args:
            frozen: observe only.
            arrival: requests that begin after `window`, and that this decision is for.

        Returns:
            The moves that began.
        """
        slots.tick()
        slots.settle()
        self.tracker.update(window.mass, window.tokens, window.steps)
        self.auto_pause.observe(window.mass, window.tokens, window.upgraded, window.top_k)
        if arrival is not None:
            self.tracker.begin(arrival)
        if not slots.num_slots:
            return []
        slots.reclaim()
        prompt_tokens = arrival.num_tokens if arrival is not None else 0
        begun = [move for move in self._decide(slots, frozen, prompt_tokens) if slots.submit(move)]
        self.limit.spend(sum(move.promote for move in begun))
        slots.settle()
        return begun

    def pin(self, key: tuple[int, int], pin: int, slots: Slots) -> None:
        """Pin one expert, 1 to its upgrade and -1 to its base, or 0 for neither, and begin the moves that this takes.

        Raises:
            SettingsError: every slot that it could have is pinned to another.
        """
        for move in self.controller.pin(key, pin, slots):
            slots.submit(move)
            slots.reclaim()

    def fill(self, slots: Slots) -> None:
        """Begin to give every free slot to the best expert that lacks one."""
        for move in self.controller.fill(self.tracker.expected, slots)[: slots.allowance]:
            slots.submit(move)

    def refill(self, slots: Slots) -> None:
        """Begin to fill slots that have been added, where no tick would: a policy that stands still takes any."""
        if self._stands_still:
            self.fill(slots)

    def best_set(self, slots: Slots) -> np.ndarray:
        """The experts `[L, E]` to upgrade if none held a slot yet."""
        none = np.zeros_like(slots.upgraded)
        return self.controller.followed(self.tracker.expected, none, slots.barred, slots.num_slots)

    def verdict(self, upgraded: np.ndarray, frozen: bool = False) -> Verdict:
        """Whether it is worth it here, with the experts `upgraded [L, E]`."""
        return self.auto_pause.verdict(upgraded, frozen or self._stands_still)

    def _decide(self, slots: Slots, frozen: bool, prompt_tokens: int) -> list[Transition]:
        """The moves to begin: none while frozen or while the store rests, only into empty slots while paused."""
        frozen = frozen or self._stands_still
        hotness, controller = self.tracker.expected, self.controller
        followed = controller.followed(hotness, slots.upgraded, slots.barred, slots.num_slots)
        self.auto_pause.review(followed, slots.upgraded, frozen)
        allowed = self.limit.promotions(prompt_tokens)
        if slots.allowance is not None:
            allowed = min(allowed, slots.allowance)
        if frozen or slots.allowance == 0:
            return []  # no upgrade is taken away for another that cannot come
        if self.auto_pause.paused:
            return controller.fill(hotness, slots)[:allowed]
        return controller.choose(hotness, followed, slots, allowed)


def tracker_for(shape: tuple[int, int], settings: Settings) -> HotnessTracker:
    """The tracker that settings ask for: one that knows requests, or the plain moving average."""
    knows_requests = settings.alpha is None and settings.num_kinds > 1
    return (RequestTracker if knows_requests else HotnessTracker)(shape, settings)


def _checked(wanted: object, score: np.ndarray, num_slots: int) -> np.ndarray:
    wanted = np.asarray(wanted)
    if wanted.shape != score.shape or wanted.dtype != bool or wanted.sum() > num_slots:
        raise SettingsError(
            f"the policy must return at most {num_slots} True in a bool array {score.shape}, "
            f"got {wanted.dtype} {wanted.shape} with {np.count_nonzero(wanted)} set"
        )
    return wanted
