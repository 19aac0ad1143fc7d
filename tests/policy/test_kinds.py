"""Kinds of traffic are told apart as they come, and a request meets what its kind needs from its first layer on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupts

from dynaexq.policy.hotness import HotnessTracker
from dynaexq.policy.kinds import WORD_BUCKETS, Arrival, Kinds, LearnedKinds, bag_of_words
from dynaexq.policy.rate_limit import UNLIMITED_TICK_BYTES, CopyRateLimiter
from dynaexq.policy.requests import CARRIED_OVER, RequestTracker
from dynaexq.policy.selection import top_n
from dynaexq.settings import Settings

SHAPE = LAYERS, EXPERTS = 3, 24
SLOTS = 18
NUM_KINDS = 4


class Traffic:
    """Requests of a few kinds: each kind has favorite experts in every layer, and favorite words.

    Args:
        sharing: share of the mass that falls on all experts alike.
    """

    def __init__(self, seed: int = 0, sharing: float = 0.4):
        self.rng = np.random.default_rng(seed)
        even = np.full(EXPERTS, sharing / EXPERTS)
        self.profiles = np.zeros((NUM_KINDS, *SHAPE))
        for kind in range(NUM_KINDS):
            for layer in range(LAYERS):
                favorites = self.rng.permutation(EXPERTS)[:6]
                self.profiles[kind, layer] = even
                self.profiles[kind, layer, favorites] += (1 - sharing) / 6

    def prompt(self, kind: int, length: int = 64) -> np.ndarray:
        """Token ids; two words in three are of the kind."""
        own = self.rng.integers(1000 * kind, 1000 * kind + 60, length)
        return np.where(self.rng.random(length) < 2 / 3, own, self.rng.integers(9000, 9060, length))

    def routed(self, kind: int, tokens: int) -> np.ndarray:
        """Mass `[L, E]` of so many tokens with two experts each, of equal weight."""
        profile = self.profiles[kind]
        return np.stack([self.rng.multinomial(2 * tokens, row / row.sum()) for row in profile]) / 2


def tracker(**options: object) -> RequestTracker:
    return RequestTracker(SHAPE, Settings(**options))


def tokens(count: int) -> np.ndarray:
    return np.full(LAYERS, count)


def chosen(hotness: np.ndarray) -> np.ndarray:
    return top_n(hotness.reshape(1, -1), np.zeros((1, hotness.size), bool), np.array([SLOTS]), 0.0).reshape(SHAPE)


def coverage(traffic: Traffic, tracked: HotnessTracker, order: np.ndarray) -> dict[str, float]:
    """Share of the mass of prompts and of answers that the chosen experts get, with a decision after each part."""
    met = {"prompt": [0.0, 0.0], "answer": [0.0, 0.0]}
    for kind in order:
        words = traffic.prompt(kind)
        tracked.begin(Arrival.of([words]))
        for part, count in (("prompt", len(words)), *[("answer", 32)] * 4):
            mass = traffic.routed(kind, count)
            met[part][0] += mass[chosen(tracked.expected)].sum()
            met[part][1] += mass.sum()
            tracked.update(mass, tokens(count), 1)
    return {part: hit / total for part, (hit, total) in met.items()}


@pytest.mark.parametrize("seed", range(3))
def test_interleaved_requests_beat_a_frozen_map_on_prompts_and_answers_and_a_moving_average_as_well(seed: int) -> None:
    order = np.random.default_rng(seed).integers(0, NUM_KINDS, 120)
    average = Traffic(seed).profiles.mean(0)
    found = {}
    for name, made in {
        "frozen": HotnessTracker(SHAPE, Settings(half_life=1e12)),
        "average": HotnessTracker(SHAPE, Settings()),
        "requests": tracker(),
    }.items():
        made.start_from(average)
        found[name] = coverage(Traffic(seed), made, order)
    kinds = Traffic(seed).profiles
    oracle = np.mean([kinds[k][chosen(kinds[k])].sum() / LAYERS for k in order])
    for part in ("prompt", "answer"):
        gained = (found["requests"][part] - found["frozen"][part]) / (oracle - found["frozen"][part])
        assert gained > 0.85, (part, found)
    assert found["average"]["prompt"] < found["frozen"]["prompt"], "else interleaving is no matter here"
    assert found["requests"]["answer"] > found["average"]["answer"] + 0.05


def test_a_shift_is_followed_though_no_request_is_told() -> None:
    """One endless request, as of a server that batches continuously."""
    traffic, tracked = Traffic(1), tracker()
    for kind in (0, 1, 0):
        for _ in range(24):
            tracked.update(traffic.routed(kind, 32), tokens(32), 1)
        wanted = chosen(traffic.profiles[kind])
        assert (chosen(tracked.expected) & wanted).sum() >= 0.85 * SLOTS


def test_the_kind_of_a_batch_is_the_mixture_of_its_rows() -> None:
    traffic, tracked = Traffic(), tracker()
    coverage(traffic, tracked, np.random.default_rng(0).integers(0, NUM_KINDS, 60))
    tracked.begin(Arrival.of([traffic.prompt(0), traffic.prompt(1)]))
    both = traffic.profiles[:2].mean(0)
    assert np.corrcoef(tracked.expected.ravel(), both.ravel())[0, 1] > 0.9
    learned = tracked.learned
    for _ in range(20):
        tracked.update(traffic.routed(0, 32) + traffic.routed(1, 32), tokens(64), 1)
    tracked.begin(Arrival.of([traffic.prompt(2)]))
    np.testing.assert_array_equal(tracked.learned.profiles, learned.profiles)  # it was of no one kind


def test_requests_join_others_that_go_on() -> None:
    """As in continuous batching: what is expected is the mean of all that are at work."""
    traffic, tracked = Traffic(), tracker()
    coverage(traffic, tracked, np.random.default_rng(0).integers(0, NUM_KINDS, 60))
    tracked.begin(Arrival.of([traffic.prompt(0)]))
    tracked.begin(Arrival.of([traffic.prompt(1)], num_others=1))
    both = traffic.profiles[:2].mean(0)
    assert np.corrcoef(tracked.expected.ravel(), both.ravel())[0, 1] > 0.9
    tracked.begin(Arrival.of([traffic.prompt(2)], num_others=7))
    assert np.corrcoef(tracked.expected.ravel(), traffic.profiles[2].ravel())[0, 1] < 0.5


def test_words_that_are_not_known_leave_what_was_usual() -> None:
    traffic, tracked = Traffic(), tracker()
    coverage(traffic, tracked, np.array([0, 1] * 20))
    tracked.begin(Arrival.unknown(64))
    assert np.corrcoef(tracked.expected.ravel(), traffic.profiles[:2].mean(0).ravel())[0, 1] > 0.9


def test_short_requests_are_learned_from_together() -> None:
    """None of them has enough tokens to say what it is."""
    traffic, tracked = Traffic(), tracker()
    for _ in range(40):
        tracked.begin(Arrival.of([traffic.prompt(2, 8)]))
        tracked.update(traffic.routed(2, 8), tokens(8), 1)
    assert tracked.learned.tokens.sum() > 180
    assert (chosen(tracked.expected) & chosen(traffic.profiles[2])).sum() >= 0.9 * SLOTS


def test_one_kind_is_the_moving_average_over_a_prior() -> None:
    """Its naive twin, for a request of which nothing was recognized."""
    traffic, tracked = Traffic(), tracker(half_life=50)
    prior, own, seen = np.full(SHAPE, 1 / EXPERTS), np.zeros(SHAPE), 0.0
    for count in (20, 5, 3, 12):
        mass = traffic.routed(0, count)
        keep = 0.5 ** (count / 50)
        own, seen = keep * own + mass, keep * seen + count
        tracked.update(mass, tokens(count), 1)
        np.testing.assert_allclose(tracked.expected, (50 * prior + own) / (50 + seen))
    tracked.begin(Arrival.of([traffic.prompt(0)]))
    left = CARRIED_OVER * 50 / seen
    np.testing.assert_allclose(tracked.expected, (50 * prior + left * own) / (50 + left * seen))


def test_what_people_see_is_the_moving_average_of_all_requests() -> None:
    """Whatever the request at work is expected to route."""
    traffic, tracked, average = Traffic(), tracker(), HotnessTracker(SHAPE, Settings())
    for kind in (0, 1, 2, 0):
        tracked.begin(Arrival.of([traffic.prompt(kind)]))
        mass = traffic.routed(kind, 40)
        for made in (tracked, average):
            made.update(mass, tokens(40), 1)
    np.testing.assert_array_equal(tracked.hotness, average.hotness)
    assert (tracked.expected != average.expected).any()


def test_empty_windows_change_nothing() -> None:
    tracked = tracker()
    tracked.update(Traffic().routed(0, 16), tokens(16), 1)
    before = tracked.expected.copy()
    tracked.update(np.zeros(SHAPE), tokens(0), 0)
    np.testing.assert_array_equal(tracked.expected, before)


def test_what_was_learned_goes_on_in_another_run() -> None:
    traffic, tracked = Traffic(), tracker()
    coverage(traffic, tracked, np.random.default_rng(0).integers(0, NUM_KINDS, 60))
    fresh, prompt = tracker(), traffic.prompt(3)
    fresh.start_from(tracked.average, tracked.learned)
    np.testing.assert_allclose(fresh.average, tracked.average)
    fresh.begin(Arrival.of([prompt]))
    assert (chosen(fresh.expected) & chosen(traffic.profiles[3])).sum() >= 0.9 * SLOTS
    fewer = tracker(num_kinds=2)
    fewer.start_from(tracked.average, tracked.learned)
    assert len(fewer.learned.tokens) == 2
    assert (
        np.corrcoef(fewer.average.ravel(), tracked.average.ravel())[0, 1] > 0.9
    )  # a kind rests on no more than MOST_TOKENS
    np.testing.assert_allclose(fewer.learned.words.sum(0), tracked.learned.words.sum(0))


def test_what_two_replicas_have_learned_of_the_same_kinds_is_learned_once() -> None:
    learned = []
    for order in (0, 1):
        traffic, tracked = Traffic(), tracker(num_kinds=NUM_KINDS)
        coverage(traffic, tracked, np.random.default_rng(order).integers(0, NUM_KINDS, 60))
        learned.append(tracked.learned)
    both = Kinds.known(LearnedKinds.joined(learned), NUM_KINDS).learned
    for profile in Traffic().profiles:
        assert np.abs(both.routing_shares - profile).sum((1, 2)).min() < 0.25 * LAYERS


def test_a_share_of_mass_that_is_not_one_is_kept() -> None:
    """Routers of some families scale their weights: hotness has their scale, and evidence does not."""
    one, other = tracker(), tracker()
    order = np.random.default_rng(0).integers(0, NUM_KINDS, 30)
    for made, scale in ((one, 1.0), (other, 2.5)):
        traffic = Traffic()
        made.start_from(scale * traffic.profiles.mean(0))
        for kind in order:
            made.begin(Arrival.of([traffic.prompt(kind)]))
            made.update(scale * traffic.routed(kind, 100), tokens(100), 1)
    np.testing.assert_allclose(other.expected, 2.5 * one.expected)


def test_what_is_rare_becomes_one_where_there_are_too_many_kinds() -> None:
    kinds = Kinds(LearnedKinds.single(np.full(SHAPE, 1 / EXPERTS), 0), most=3)
    rng = np.random.default_rng(0)
    homes = [np.eye(EXPERTS)[rng.integers(0, EXPERTS, LAYERS)] * 0.9 + 0.1 / EXPERTS for _ in range(5)]
    for _ in range(6):
        kinds = kinds.learn(homes[0] + 0.01 * rng.random(SHAPE), 256, None, True)
    for home in homes[1:3]:
        kinds = kinds.learn(home, 100, None, True)
    assert len(kinds) == 3
    kinds = kinds.learn(homes[3], 400, None, True)
    assert len(kinds) == 3
    away = np.abs(kinds.learned.profiles - homes[3]).sum((1, 2))
    assert away.min() < 1e-9, "the new one has a place"
    assert np.abs(kinds.learned.profiles - homes[0]).sum((1, 2)).min() < 0.5, "and the one in use has kept its own"


@given(ids=st.lists(st.integers(0, 2**31), max_size=50))
def test_a_bag_has_every_word_once(ids: list[int]) -> None:
    bag = bag_of_words(np.array(ids, dtype=np.int64))
    assert bag.shape == (WORD_BUCKETS,)
    assert bag.sum() == len(ids)
    np.testing.assert_array_equal(bag, bag_of_words(np.array(ids[::-1], dtype=np.int64)))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    most=st.integers(1, 5),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400), st.booleans(), st.booleans()), max_size=25),
)
def test_beliefs_are_shares_and_kinds_never_too_many(
    seed: int, most: int, steps: list[tuple[int, int, bool, bool]]
) -> None:
    traffic, kinds = Traffic(seed), Kinds(LearnedKinds.single(np.full(SHAPE, 1 / EXPERTS), 0), most)
    for kind, count, has_words, begins in steps:
        mass, bag = traffic.routed(kind, count), bag_of_words(traffic.prompt(kind))
        before = kinds.learned.profiles.copy()
        for belief in (
            kinds.before_words(),
            kinds.given_words(kinds.before_words(), bag),
            kinds.given_routing(kinds.before_words(), mass, count),
        ):
            assert belief.shape == (len(kinds),)
            assert (belief >= 0).all()
            assert belief.sum() == pytest.approx(1)
        after = kinds.learn(mass / count, count, bag if has_words else None, begins)
        np.testing.assert_array_equal(kinds.learned.profiles, before)
        kinds = after
        assert len(kinds) <= most
        assert np.isfinite(kinds.log_shares).all()
        np.testing.assert_allclose(kinds.learned.profiles.sum(-1), 1.0)


def test_what_is_cut_short_has_not_happened() -> None:
    traffic, tracked = Traffic(), tracker(num_kinds=2)
    coverage(traffic, tracked, np.array([0, 1, 2]))
    mass, prompt = traffic.routed(3, 200), Arrival.of([traffic.prompt(3)])

    def go_on() -> None:
        tracked.update(mass, tokens(200), 1)
        tracked.begin(prompt)

    states = []
    for where in interrupts(lambda: states.append(tracked._state), go_on):
        kinds, request = tracked._state
        assert len(kinds) == len(request.belief), where
        assert tracked._state is states[-1] or request is not states[-1][1], where
        assert np.isfinite(tracked.expected).all(), where
    assert len(states) > 20


def test_a_prompt_may_copy_for_as_long_as_it_takes() -> None:
    slot = UNLIMITED_TICK_BYTES // 4
    limit = CopyRateLimiter(None, slot)
    assert [limit.promotions(n) for n in (0, 31, 64, 320)] == [4, 4, 8, 40]
    rate = CopyRateLimiter(8.0 * slot, slot, lambda: 0.0)
    assert rate.promotions(320) == rate.promotions()


def test_learned_kinds_average_by_their_tokens() -> None:
    profiles = np.stack([np.zeros(SHAPE), np.ones(SHAPE)])
    learned = LearnedKinds(profiles, np.array([1.0, 3.0]), np.zeros((2, WORD_BUCKETS)), np.zeros(2))
    np.testing.assert_allclose(learned.average, 0.75)
    np.testing.assert_allclose(learned.merged(0, 1).average, 0.75)
    np.testing.assert_allclose(learned.with_an_empty_one().average, 0.75)
