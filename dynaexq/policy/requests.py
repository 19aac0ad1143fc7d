"""Hotness that knows requests: what is expected of a kind of traffic, and what the request itself has routed.

A request begins with a prompt at the model's door. From then on the hotness is the profile of the kinds that it seems
to be of, worth `half_life` tokens, together with its own counts, which fade as in the moving average. So the choice is
right for a kind that is known before the first layer runs, and where nothing is recognized it is the moving average
over a prior. A flow without known beginnings is one endless request; where requests join others that go on, as in
continuous batching, all of them are believed in together.
"""

from dataclasses import dataclass, replace

import numpy as np

from dynaexq.policy.hotness import HotnessTracker, decay_by_tokens
from dynaexq.policy.kinds import LONGEST_STRETCH, SHORTEST_STRETCH, Arrival, Kinds, LearnedKinds
from dynaexq.settings import Settings

PRIOR_TOKENS = 256.0
"""What a hotness to start from counts for among the kinds: as much as one stretch of text."""

CARRIED_OVER = 0.25
"""Most that the counts of the requests before weigh in the next one, in half-lives: of its kind they say something."""


@dataclass(frozen=True, eq=False)
class _Counts:
    """Routing mass `[L, E]` and the tokens `[L]` that it came from."""

    mass: np.ndarray
    tokens: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, int]) -> "_Counts":
        return cls(np.zeros(shape), np.zeros(shape[0]))

    def and_more(self, mass: np.ndarray, tokens: np.ndarray) -> "_Counts":
        return _Counts(self.mass + mass, self.tokens + tokens)

    def faded(self, keep: np.ndarray) -> "_Counts":
        """What is left of them where each layer keeps the share `keep [L]`."""
        return _Counts(keep[:, None] * self.mass, keep * self.tokens)


@dataclass(frozen=True, eq=False)
class _Request:
    """What is at work, and what is known of it. The counts of the one before are taken over as far as it is alike.

    Attributes:
        belief: in the kinds `[K]`.
        own: what it has routed, fading.
        stretch: what it has routed since something was last learned from it.
        num_rows: sequences of the batch.
        is_mixed: whether they are of several kinds, as far as their words say.
        bag: the words of its prompts, until they were learned.
        is_new: whether nothing was learned from it yet.
    """

    belief: np.ndarray
    own: _Counts
    stretch: _Counts
    num_rows: int = 1
    is_mixed: bool = False
    bag: np.ndarray | None = None
    is_new: bool = False


class RequestTracker(HotnessTracker):
    """A moving average for people to see, and for decisions what to expect of the request, or batch of them, at work.

    What is expected comes of one tuple, replaced in one step, so that what is cut short has not happened.

    Args:
        shape: (L, E).
    """

    knows_requests = True

    def __init__(self, shape: tuple[int, int], settings: Settings):
        super().__init__(shape, settings)
        assert settings.half_life is not None, "settings fill it in"
        self._half_life, self._most, self._none = settings.half_life, settings.num_kinds, _Counts.none(shape)
        kinds = Kinds(LearnedKinds.single(self.hotness, 0), self._most)
        self._go_on(kinds, _Request(kinds.before_words(), self._none, self._none))

    @property
    def expected(self) -> np.ndarray:
        """The hotness `[L, E]` that the request at work is expected to have."""
        return self._expected

    @property
    def average(self) -> np.ndarray:
        """Hotness `[L, E]` of all traffic so far."""
        return self.learned.average

    @property
    def learned(self) -> LearnedKinds:
        """The kinds of traffic seen so far."""
        return self._state[0].learned

    def start_from(self, hotness: np.ndarray, learned: LearnedKinds | None = None) -> None:
        """Take `hotness [L, E]` for what was seen, or the kinds that it is the average of."""
        super().start_from(hotness)
        kinds = Kinds.known(learned or LearnedKinds.single(hotness, PRIOR_TOKENS), self._most)
        self._go_on(kinds, _Request(kinds.before_words(), self._none, self._none))

    def begin(self, arrival: Arrival) -> None:
        """Requests begin: their prompts are about to be routed."""
        kinds, last = self._learned_from(*self._state)
        before = kinds.before_words()
        beliefs = [kinds.given_words(before, bag) for bag in arrival.bags] or [before]
        others = arrival.num_others
        belief = (np.sum(beliefs, axis=0) + others * last.belief) / (len(beliefs) + others)
        kind, found = int(last.belief.argmax()), {int(belief.argmax()) for belief in beliefs}
        most = CARRIED_OVER * self._half_life
        request = _Request(
            belief=belief,
            own=last.own.faded(belief[kind] * most / np.maximum(last.own.tokens, most)),
            stretch=last.stretch if belief.argmax() == kind else self._none,
            num_rows=len(beliefs) + others,
            is_mixed=len(found | ({kind} if others else set())) > 1 or (others > 0 and last.is_mixed),
            bag=arrival.bags.sum(0) if len(arrival.bags) else None,
            is_new=True,
        )
        self._go_on(kinds, request)

    def update(self, mass: np.ndarray, tokens: np.ndarray, steps: int) -> None:
        """Take in the routing of the last `steps` forwards: mass `[L, E]`, tokens `[L]`."""
        seen = float(tokens.max(initial=0))
        if not seen:
            return
        kinds, request = self._state
        belief = request.belief
        if request.num_rows == 1:  # which of several rows routed what is not known
            belief = kinds.given_routing(belief, mass, seen)
        own = request.own.faded(decay_by_tokens(tokens, self._half_life)).and_more(mass, tokens)
        request = replace(request, belief=belief, own=own, stretch=request.stretch.and_more(mass, tokens))
        if request.stretch.tokens.max() >= LONGEST_STRETCH:
            kinds, request = self._learned_from(kinds, request)
        self._go_on(kinds, request)
        super().update(mass, tokens, steps)

    def _learned_from(self, kinds: Kinds, request: _Request) -> tuple[Kinds, _Request]:
        """Let the kinds take in the stretch that ends here, unless it is too short yet, or of several kinds."""
        mass, tokens = request.stretch.mass, request.stretch.tokens
        if request.is_mixed:
            return kinds, replace(request, stretch=self._none)
        if tokens.min() < SHORTEST_STRETCH:
            return kinds, request
        kinds = kinds.learn(mass / tokens[:, None], float(tokens.min()), request.bag, request.is_new)
        belief = np.pad(request.belief, (0, len(kinds) - len(request.belief)))
        return kinds, replace(request, belief=belief, stretch=self._none, bag=None, is_new=False)

    def _go_on(self, kinds: Kinds, request: _Request) -> None:
        self._state = kinds, request
        own, of_kind = request.own, self._half_life * kinds.profile(request.belief)
        self._expected = (of_kind + own.mass) / (self._half_life + own.tokens[:, None])
