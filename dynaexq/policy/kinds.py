"""Kinds of traffic, told apart as they come: what each routes to, and the words it speaks. Numpy only.

Text of one kind, such as code in one language, meets other experts than text of another. Each kind is a profile, the
routing mass per token `[L, E]`, beside counts of the words of its prompts; both are learned from the traffic, with
nothing named or labeled. A prompt is recognized by its words before any layer has run (naive Bayes), and by its
routing afterwards. Belief in the kinds is a row of shares `[K]`.

Shapes: L layers, E experts per layer, K kinds. When a request ends is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

WORD_BUCKETS = 4096
"""Words fall into so many buckets by a hash of their token ids: enough to tell kinds apart in any vocabulary."""

WORD_EVIDENCE = 0.15
"""How much of its log-likelihood a word counts for: words that stand together are not independent."""

ROUTING_EVIDENCE = 0.1
"""The same of a token's routing, the mean over layers: layers repeat one another."""

PSEUDO_WORDS = 800.0
"""Words as frequent as in all traffic that each kind begins with, so that what it has never said is not impossible."""

SMOOTHING = 0.02
"""Share of a token's mass that lies evenly on all experts in a profile that evidence is weighed by."""

MOST_TOKENS = 4096.0
"""A profile is a mean over at most about so many tokens, so that it can change."""

FORGOTTEN_AFTER = 65_536.0
"""Tokens of other kinds after which a kind counts for a third; the one with least gives way to a new one."""

LONGEST_STRETCH, SHORTEST_STRETCH = 256, 64
"""Tokens that are learned from together: more say more about the kind, fewer than the least say nothing."""

WORDS_KEPT = 0.98
"""Share of a kind's counts of words that is kept when those of another prompt come."""

RECENT_KEPT, STEADINESS_KEPT = 0.8, 0.95
"""Shares kept, per stretch of text, of what kinds there were of late, and per request, of what is known of how well
that foretells the next one."""

LEAST_CHANCE = 0.02
"""Least chance of a kind that a foretelling is judged by."""

CHANGE_PER_TOKEN = 1 / 2048
"""Chance that the kind changes from one token to the next within a request."""


@dataclass(frozen=True, eq=False)
class LearnedKinds:
    """What can be kept of the kinds of traffic.

    Attributes:
        profiles: float `[K, L, E]`, routing mass per token.
        tokens: float `[K]`, what each rests on.
        words: float `[K, WORD_BUCKETS]`, counts of words.
        recent: float `[K]`, how much of the latest text was of each; it adds up to at most 1.
    """

    profiles: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    recent: np.ndarray

    @classmethod
    def single(cls, profile: np.ndarray, tokens: float) -> "LearnedKinds":
        """One kind, taken for `profile [L, E]`, which rests on `tokens`; on none if it is a guess."""
        profiles = np.array(profile, dtype=np.float64)[None]
        return cls(profiles, np.array([tokens]), np.zeros((1, WORD_BUCKETS)), np.zeros(1))

    @classmethod
    def joined(cls, several: Sequence["LearnedKinds"]) -> "LearnedKinds":
        """The kinds of all of `several`."""
        parts = (np.concatenate(of_all) for of_all in zip(*(learned._parts for learned in several), strict=True))
        profiles, tokens, words, recent = parts
        return cls(profiles, tokens, words, recent / len(several))

    @property
    def average(self) -> np.ndarray:
        """The profile of all traffic, `[L, E]`."""
        return np.average(self.profiles, axis=0, weights=self.tokens if self.tokens.any() else None)

    @property
    def shares(self) -> np.ndarray:
        """How much of the traffic is of each kind, `[K]`."""
        total = self.tokens.sum()
        return self.tokens / total if total else np.full(len(self.tokens), 1 / len(self.tokens))

    @cached_property
    def routing_shares(self) -> np.ndarray:
        """The profiles with each layer's mass as shares of one, float32."""
        return _shares(self.profiles)

    def at(self, kinds: np.ndarray) -> "LearnedKinds":
        """The kinds of these numbers, in this order."""
        return LearnedKinds(*(part[kinds] for part in self._parts))

    def with_an_empty_one(self) -> "LearnedKinds":
        """The same and, last, a kind of which nothing is known."""
        return LearnedKinds(*(np.concatenate([part, np.zeros_like(part[:1])]) for part in self._parts))

    def merged(self, one: int, other: int) -> "LearnedKinds":
        """The same with two kinds as one, at the place of `one`, and nothing known of `other`."""
        profiles, tokens, words, recent = (part.copy() for part in self._parts)
        profiles[one] = np.average(profiles[[one, other]], axis=0, weights=np.maximum(tokens[[one, other]], 1e-9))
        for part in (tokens, words, recent):
            part[one] += part[other]
            part[other] = 0.0
        return LearnedKinds(profiles, np.minimum(tokens, MOST_TOKENS), words, recent)

    def updated(self, kind: int, profile: np.ndarray, tokens: float, bag: np.ndarray | None) -> "LearnedKinds":
        """The same after `tokens` more of one kind, of this profile and with these words."""
        profiles, _, words, recent = (part.copy() for part in self._parts)
        left = self.tokens * np.exp(-tokens / FORGOTTEN_AFTER)
        profiles[kind] += tokens / (left[kind] + tokens) * (profile - profiles[kind])
        left[kind] = min(left[kind] + tokens, MOST_TOKENS)
        if bag is not None:
            words[kind] = WORDS_KEPT * words[kind] + bag
        recent *= RECENT_KEPT
        recent[kind] += 1 - RECENT_KEPT
        return LearnedKinds(profiles, left, words, recent)

    @property
    def _parts(self) -> tuple[np.ndarray, ...]:
        return self.profiles, self.tokens, self.words, self.recent


def bag_of_words(ids: np.ndarray) -> np.ndarray:
    """How many of the token `ids` (int64, of any number) fall into each bucket `[WORD_BUCKETS]`."""
    scattered = (ids.astype(np.uint64) * np.uint64(2654435761)) >> np.uint64(7)  # Knuth's multiplicative hash
    return np.bincount((scattered % np.uint64(WORD_BUCKETS)).astype(np.int64), minlength=WORD_BUCKETS).astype(float)


@dataclass(frozen=True, eq=False)
class Arrival:
    """What has come to the model's door: one request, or several as the rows of a batch.

    >>> Arrival.of([np.array([7, 8, 9])]).num_tokens
    3

    Attributes:
        bags: float `[R, WORD_BUCKETS]`, the words of each prompt; no rows where they are not known.
        num_tokens: of all prompts together.
        num_others: requests that go on beside them.
    """

    bags: np.ndarray
    num_tokens: int
    num_others: int = 0

    @classmethod
    def of(cls, prompts: list[np.ndarray], num_others: int = 0) -> "Arrival":
        """The arrival of `prompts`, each an array of token ids, beside so many others."""
        return cls(np.array([bag_of_words(ids) for ids in prompts]), sum(map(len, prompts)), num_others)

    @classmethod
    def unknown(cls, num_tokens: int) -> "Arrival":
        """An arrival of so many tokens without known words, such as embeddings."""
        return cls(np.zeros((0, WORD_BUCKETS)), num_tokens)


@dataclass(frozen=True, eq=False)
class Kinds:
    """The kinds of traffic seen so far. There is always one, and nothing here ever changes: learning makes another.

    Attributes:
        learned: the kinds.
        most: how many are told apart.
        steadiness: logarithm of the odds that what came of late foretells the next request better than what comes in
            the long run.
    """

    learned: LearnedKinds
    most: int
    steadiness: float = 0.0

    @classmethod
    def known(cls, learned: LearnedKinds, most: int) -> "Kinds":
        """What another run, or several, have learned; the nearest are taken for one while they are too many."""
        while len(learned.tokens) > most:
            cost = _cost_of_merging(learned.routing_shares, learned.tokens)
            one, other = (int(place) for place in np.unravel_index(cost.argmin(), cost.shape))
            learned = learned.merged(one, other).at(np.delete(np.arange(len(learned.tokens)), other))
        return cls(learned, most)

    def __len__(self) -> int:
        return len(self.learned.tokens)

    @cached_property
    def log_shares(self) -> np.ndarray:
        """What evidence is weighed by, `[K, L, E]`."""
        evenly = SMOOTHING / self.learned.profiles.shape[-1]
        return np.log(np.float32(1 - SMOOTHING) * self.learned.routing_shares + np.float32(evenly))

    def profile(self, belief: np.ndarray) -> np.ndarray:
        """Routing mass per token to expect, `[L, E]`."""
        return np.tensordot(belief, self.learned.profiles, 1)

    def before_words(self) -> np.ndarray:
        """Belief in the kind of the next request, from those before it."""
        steady, recent = 1 / (1 + np.exp(-self.steadiness)), self.learned.recent
        belief = steady * recent + (1 - steady * recent.sum()) * self.learned.shares
        return belief / belief.sum()

    def given_words(self, belief: np.ndarray, bag: np.ndarray) -> np.ndarray:
        """The belief after a look at the words of a prompt, `bag [WORD_BUCKETS]`."""
        words, said = self.learned.words, np.flatnonzero(bag)
        everywhere = (words.sum(0)[said] + 0.5) / (words.sum() + 0.5 * WORD_BUCKETS)
        spoken = words.sum(1, keepdims=True)
        chances = (words[:, said] + PSEUDO_WORDS * everywhere) / (spoken + PSEUDO_WORDS)
        return _posterior(belief, WORD_EVIDENCE * np.log(chances) @ bag[said])

    def given_routing(self, belief: np.ndarray, mass: np.ndarray, tokens: float) -> np.ndarray:
        """The belief after `tokens` more, whose routing mass was `mass [L, E]`."""
        change = 1 - (1 - CHANGE_PER_TOKEN) ** tokens
        before = (1 - change) * belief + change * self.learned.shares
        fit = self.log_shares.reshape(len(self), -1) @ _shares(mass).ravel()
        return _posterior(before, ROUTING_EVIDENCE * tokens / len(mass) * fit)

    def learn(self, profile: np.ndarray, tokens: float, bag: np.ndarray | None, begins_request: bool) -> "Kinds":
        """What is known after another stretch of text.

        It joins the nearest kind, unless two kinds are nearer to each other than it is to any: then those become one,
        and it begins a kind of its own (online agglomerative clustering; Guedalia, London and Werman, 1999).

        Args:
            profile: `[L, E]`, its routing mass per token.
            bag: the words of the prompt it began with, if they are known.
            begins_request: whether it is the first stretch of a request.
        """
        learned, kind = self._with_room_for(profile, tokens)
        steadiness = self.steadiness
        if begins_request and learned.tokens[kind]:
            recent, usual = (max(LEAST_CHANCE, part[kind]) for part in (learned.recent, learned.shares))
            steadiness = STEADINESS_KEPT * steadiness + float(np.log(recent / usual))
        return Kinds(learned.updated(kind, profile, tokens, bag), self.most, steadiness)

    def _with_room_for(self, profile: np.ndarray, tokens: float) -> tuple[LearnedKinds, int]:
        """The kinds, and which of them a stretch of text belongs to: one that it is like, or an empty one."""
        learned = self.learned
        if not learned.tokens.any():
            return learned, 0  # what was only a guess gives way
        if len(self) < self.most:
            return learned.with_an_empty_one(), len(self)
        shares = np.concatenate([learned.routing_shares, _shares(profile)[None]])
        cost = _cost_of_merging(shares, np.append(learned.tokens, tokens))
        nearest, pairs = int(cost[-1, :-1].argmin()), cost[:-1, :-1]
        one, other = (int(place) for place in np.unravel_index(pairs.argmin(), pairs.shape))
        if cost[-1, nearest] <= pairs[one, other]:
            return learned, nearest
        return learned.merged(one, other), other


def _cost_of_merging(shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Ward's cost `[N, N]` of taking two profiles of `shares [N, L, E]` for one, which rest on `tokens [N]`.

    In squares of the Hellinger distance, in which the noise of counts is the same wherever they lie. Infinite for a
    profile and itself.
    """
    points = np.sqrt(shares).reshape(len(shares), -1)
    products = points @ points.T
    squares = np.diag(products)
    away = np.maximum(squares[:, None] + squares - 2 * products, 0)
    cost: np.ndarray = away * tokens[:, None] * tokens / np.maximum(tokens[:, None] + tokens, 1e-9)
    np.fill_diagonal(cost, np.inf)
    return cost


def _shares(profiles: np.ndarray) -> np.ndarray:
    """Each layer's mass as shares of one, in float32, of which logarithms and roots are taken several times faster."""
    total = np.maximum(profiles.sum(-1, keepdims=True), 1e-30)
    shares: np.ndarray = (profiles / total).astype(np.float32)
    return shares


def _posterior(belief: np.ndarray, log_likelihood: np.ndarray) -> np.ndarray:
    """Bayes' rule."""
    worth: np.ndarray = belief * np.exp(log_likelihood - log_likelihood.max())
    return worth / worth.sum()
