"""Beliefs in the kinds of traffic against naive twins, which are loops over the definitions."""

import math

import numpy as np
import pytest

from dynaexq.policy import kinds as constants
from dynaexq.policy.kinds import WORD_BUCKETS, Kinds, LearnedKinds, bag_of_words

K, LAYERS, EXPERTS = 3, 2, 5


def some_kinds(seed: int = 0, steadiness: float = 0.4) -> Kinds:
    rng = np.random.default_rng(seed)
    words = np.zeros((K, WORD_BUCKETS))
    for kind in range(K):
        words[kind] = bag_of_words(rng.integers(50 * kind, 50 * kind + 90, 200))
    learned = LearnedKinds(rng.random((K, LAYERS, EXPERTS)), rng.uniform(50, 900, K), words, np.array([0.1, 0.3, 0.2]))
    return Kinds(learned, 4, steadiness)


def normalized(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


@pytest.mark.parametrize("steadiness", [-2.0, 0.0, 1.5])
def test_before_words_the_latest_kinds_are_weighed_against_the_usual_ones(steadiness: float) -> None:
    kinds = some_kinds(steadiness=steadiness)
    steady = 1 / (1 + math.exp(-steadiness))
    tokens, recent = kinds.learned.tokens, kinds.learned.recent
    wanted = [
        steady * recent[k] + (1 - steady * sum(recent)) * tokens[k] / sum(tokens)
        for k in range(K)
    ]  # fmt: skip
    np.testing.assert_allclose(kinds.before_words(), normalized(wanted))


def test_words_are_weighed_by_naive_bayes() -> None:
    kinds, before = some_kinds(), np.array([0.5, 0.2, 0.3])
    bag = bag_of_words(np.array([60, 60, 61, 7, 120, 4000]))
    words, total = kinds.learned.words, kinds.learned.words.sum()
    wanted = []
    for kind in range(K):
        evidence = 0.0
        for word in np.flatnonzero(bag):
            everywhere = (sum(words[:, word]) + 0.5) / (total + 0.5 * WORD_BUCKETS)
            pseudo = constants.PSEUDO_WORDS
            evidence += bag[word] * math.log((words[kind, word] + pseudo * everywhere) / (sum(words[kind]) + pseudo))
        wanted.append(before[kind] * math.exp(constants.WORD_EVIDENCE * evidence))
    np.testing.assert_allclose(kinds.given_words(before, bag), normalized(wanted), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1.0, 40.0])
def test_routing_is_weighed_by_its_likelihood_in_each_profile_and_the_kind_may_have_changed(tokens: float) -> None:
    kinds, before = some_kinds(), np.array([0.7, 0.1, 0.2])
    mass = tokens * np.random.default_rng(1).random((LAYERS, EXPERTS))
    shares = kinds.learned.tokens / kinds.learned.tokens.sum()
    change = 1 - (1 - constants.CHANGE_PER_TOKEN) ** tokens
    wanted = []
    for kind in range(K):
        fit = 0.0
        for layer in range(LAYERS):
            profile = kinds.learned.profiles[kind, layer]
            for expert in range(EXPERTS):
                smooth = constants.SMOOTHING
                chance = (1 - smooth) * profile[expert] / sum(profile) + smooth / EXPERTS
                fit += mass[layer, expert] / sum(mass[layer]) * math.log(chance)
        evidence = math.exp(constants.ROUTING_EVIDENCE * tokens * fit / LAYERS)
        wanted.append(((1 - change) * before[kind] + change * shares[kind]) * evidence)
    np.testing.assert_allclose(kinds.given_routing(before, mass, tokens), normalized(wanted), rtol=1e-4)


def test_a_stretch_of_text_changes_its_kind_and_makes_the_others_older() -> None:
    kinds = some_kinds()
    before, profile, bag = kinds.learned, np.full((LAYERS, EXPERTS), 0.25), bag_of_words(np.arange(30))
    after = before.updated(1, profile, 200.0, bag)
    left = before.tokens * math.exp(-200 / constants.FORGOTTEN_AFTER)
    np.testing.assert_allclose(after.tokens, left + np.array([0, 200, 0]))
    wanted = (left[1] * before.profiles[1] + 200 * profile) / (left[1] + 200)
    np.testing.assert_allclose(after.profiles[1], wanted)
    np.testing.assert_array_equal(after.profiles[[0, 2]], before.profiles[[0, 2]])
    np.testing.assert_allclose(after.words[1], constants.WORDS_KEPT * before.words[1] + bag)
    np.testing.assert_allclose(
        after.recent, constants.RECENT_KEPT * before.recent + (1 - constants.RECENT_KEPT) * np.eye(K)[1]
    )
    long = before.updated(1, profile, 1e6, None)
    assert long.tokens[1] == constants.MOST_TOKENS
    np.testing.assert_array_equal(long.words, before.words)


def test_merging_weighs_two_kinds_by_what_they_rest_on() -> None:
    before = some_kinds().learned
    after = before.merged(2, 0)
    tokens = before.tokens
    wanted = (tokens[0] * before.profiles[0] + tokens[2] * before.profiles[2]) / (tokens[0] + tokens[2])
    np.testing.assert_allclose(after.profiles[2], wanted)
    np.testing.assert_allclose(after.tokens, [0, tokens[1], tokens[0] + tokens[2]])
    np.testing.assert_allclose(after.words[2], before.words[0] + before.words[2])
    np.testing.assert_allclose(after.recent, [0, 0.3, 0.3])


def test_steadiness_rises_where_the_latest_kinds_foretell_the_next_request_and_falls_where_not() -> None:
    kinds = some_kinds(steadiness=1.0)
    shares = kinds.learned.shares
    stretch = kinds.learned.profiles[1]
    after = Kinds(kinds.learned, K, 1.0).learn(stretch, 100.0, None, begins_request=True)
    wanted = constants.STEADINESS_KEPT * 1.0 + math.log(0.3 / shares[1])
    assert after.steadiness == pytest.approx(wanted)
    assert Kinds(kinds.learned, K, 1.0).learn(stretch, 100.0, None, begins_request=False).steadiness == 1.0


@pytest.mark.parametrize("by", ["the nearest kind", "the nearest two"])
def test_the_cheapest_merge_by_ward_makes_room(by: str) -> None:
    """Each pair's cost counted by hand: tokens of both, harmonically, times the squared Hellinger distance."""
    rng = np.random.default_rng(3)
    profiles = rng.random((K, LAYERS, EXPERTS))
    if by == "the nearest two":
        profiles[2] = profiles[0] * 1.01
        stretch = rng.random((LAYERS, EXPERTS)) ** 6
    else:
        stretch = profiles[1] * 0.99
    tokens = np.array([300.0, 200.0, 100.0])
    kinds = Kinds(LearnedKinds(profiles, tokens, np.zeros((K, WORD_BUCKETS)), np.zeros(K)), K)
    points = [np.sqrt(p / p.sum(-1, keepdims=True)).ravel() for p in (*profiles, stretch)]
    weights = [*tokens, 100.0]
    costs = {
        (a, b): weights[a] * weights[b] / (weights[a] + weights[b]) * np.square(points[a] - points[b]).sum()
        for a in range(K + 1)
        for b in range(a)
    }
    cheapest = min(costs, key=lambda pair: costs[pair])
    after = kinds.learn(stretch, 100.0, None, begins_request=False).learned
    if by == "the nearest two":
        assert cheapest == (2, 0)
        assert after.tokens[0] == pytest.approx(400 * math.exp(-100 / constants.FORGOTTEN_AFTER))
        np.testing.assert_allclose(after.profiles[2], stretch)
    else:
        assert cheapest == (3, 1)
        assert after.tokens[1] == pytest.approx(200 * math.exp(-100 / constants.FORGOTTEN_AFTER) + 100)
