"""Is it worth it here: the averages, when moves pause and resume, and what is said; in the abstract and on a model."""

from typing import Any

import numpy as np
import patching
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from shifting import AMPLE, EVENING, MORNING, patched, run, upgraded

from dynaexq.policy import Average, Stance, Verdict, is_worth_it, lift
from dynaexq.policy.auto_pause import LEAST_PATIENCE, AutoPause
from dynaexq.policy.benefit import CHANCE_ERRORS, PAUSE_BELOW, RESUME_ABOVE, STANDARD_ERRORS
from dynaexq.settings import Settings

PATIENCE, WINDOW = 400, 8
KEEP = 0.5 ** (WINDOW / 100)


def history(advantages: list[float], variance: float = 0.0) -> list[bool]:
    """Whether moves are paused after each of these windows."""
    stance, paused = Stance(), []
    for advantage in advantages:
        stance = stance.observed(advantage, WINDOW, KEEP, variance).reviewed(PATIENCE)
        paused.append(stance.paused)
    return paused


def changes(paused: list[bool]) -> list[int]:
    """Windows at which the stance differs from the one before; it begins paused."""
    return np.flatnonzero(np.diff([True, *paused])).tolist()


advantages = st.lists(st.floats(-1, 1), min_size=1, max_size=400)


@given(advantages)
def test_however_the_traffic_behaves_it_pauses_only_after_patience(series):
    at = changes(history(series))
    resumed, paused_again = at[::2], at[1::2]
    for begun, ended in zip(resumed, paused_again, strict=False):
        assert (ended - begun) * WINDOW >= PATIENCE
    assert len(at) <= 2 * (1 + len(series) * WINDOW // PATIENCE)


@given(st.floats(-1, 1))
def test_a_steady_advantage_changes_the_stance_at_most_once(advantage):
    assert len(changes(history([advantage] * 300))) <= 1


@given(st.lists(st.floats(PAUSE_BELOW, RESUME_ABOVE), min_size=1, max_size=300), st.booleans())
def test_between_the_two_thresholds_nothing_changes(series, following):
    stance = Stance(paused=not following)
    for advantage in series:
        stance = stance.observed(advantage, WINDOW, KEEP, 0.0).reviewed(PATIENCE)
        assert stance.paused is not following


def test_it_resumes_at_once_when_following_pays_and_pauses_when_it_has_stopped_to():
    paused = history([0.0] * 100 + [0.3] * 100 + [0.0] * 300)
    resumed, paused_again = changes(paused)
    assert 100 <= resumed < 130
    assert 200 < paused_again <= 200 + 2 * PATIENCE // WINDOW


def test_what_chance_explains_ends_no_pause():
    assert changes(history([0.3] * 50, variance=0.0)) != []
    assert changes(history([0.3] * 50, variance=1e3)) == []


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.0, 0.99), st.floats(0.0, 4.0)), min_size=1, max_size=30))
def test_an_average_is_the_weighted_mean_and_its_doubt_that_of_the_windows_or_of_chance(windows):
    average, weights = Average(), np.zeros(0)
    for value, keep, variance in windows:
        average = average.add(value, keep, variance)
        weights = np.append(weights * keep, 1 - keep)
    values, _, variances = np.array(windows).T
    assert average.mean == pytest.approx(np.average(values, weights=weights), abs=1e-9)
    spread = np.average((values - average.mean) ** 2, weights=weights)
    shown = np.sqrt(spread * np.square(weights).sum()) / weights.sum()
    chance = np.sqrt((np.square(weights) * variances).sum()) / weights.sum()
    expected = max(STANDARD_ERRORS * shown, CHANCE_ERRORS * chance)
    assert average.doubt == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_doubt_is_two_standard_errors_of_the_windows_or_four_of_chance():
    assert Average().add(1.0, 0.0, variance=9.0).doubt == pytest.approx(4 * 3.0)
    assert Average().add(1.0, 0.0).add(0.0, 0.5).doubt == pytest.approx(2 * 0.5 * 0.5**0.5)
    # Weights of a quarter and a half: the variance is 2/9 about a mean of a third.
    assert Average().add(1.0, 0.5).add(0.0, 0.5).doubt == pytest.approx(2 * (2 / 9 * (1 / 16 + 1 / 4)) ** 0.5 / 0.75)


def test_an_empty_average_claims_nothing():
    assert (Average().mean, Average().doubt) == (0.0, 0.0)


@given(st.floats(0, 1), st.floats(0.01, 0.99))
def test_lift_is_zero_without_skill_and_one_for_all(removed, even):
    assert lift(even, even) == 0
    assert lift(1.0, even) == pytest.approx(1.0)
    assert is_worth_it(removed, even) == (removed - even >= 0.1 * (1 - even))


def flat_windows(rng: np.random.Generator, shape: tuple[int, int], top_k: int) -> np.ndarray:
    return rng.multinomial(WINDOW * top_k, np.full(shape[1], 1 / shape[1]), size=shape[0]) / top_k


def test_flat_traffic_never_ends_the_pause_and_is_not_worth_it():
    shape, top_k = (4, 32), 4
    watch, rng = AutoPause(np.ones(shape), Settings()), np.random.default_rng(0)
    held = np.arange(128).reshape(shape) % 5 == 0
    seen = np.zeros(shape)
    for _ in range(2 * LEAST_PATIENCE // WINDOW):
        mass = flat_windows(rng, shape, top_k)
        watch.observe(mass, np.full(4, WINDOW), held, top_k)
        seen = 0.99 * seen + mass
        watch.review(seen >= np.sort(seen.ravel())[-held.sum()], held, frozen=False)
        assert watch.paused
    verdict = watch.verdict(held, frozen=False)
    assert verdict.worth_it is False
    assert verdict.removed == pytest.approx(held.mean(), abs=0.02)
    assert str(verdict).startswith("Not worth it here")


@pytest.mark.parametrize(
    ("options", "may_pause"),
    [({}, True), ({"auto_pause": False}, False), ({"policy": "frozen"}, False), ({"policy": max}, False)],
)
def test_only_topn_pauses_by_itself(options: dict[str, Any], may_pause: bool):
    assert AutoPause(np.ones((1, 4)), Settings(**options)).paused is may_pause


def verdict_of(**changed: Any) -> Verdict:
    counts = {"worth_it": True, "following": True, "tokens": 5000, "needed": 4096}
    shares = {"even": 0.2, "coverage": 0.6, "removed": 0.6, "removed_by_start": 0.2, "advantage": 0.1}
    return Verdict(**counts | shares | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "Worth it: the upgraded 20% of the experts remove 60% of the error that upgrades can, the choice"),
        ({"following": False}, "Worth it, and holding still serves as well for now: the upgraded 20%"),
        ({"worth_it": False, "removed": 0.21}, "Not worth it here: the upgraded 20% of the experts remove 21%"),
        ({"worth_it": None, "tokens": 10}, "Too early to tell: 10 of 4,096 tokens were seen."),
        ({"even": 0.0}, "Nothing to decide: no expert can be upgraded."),
        ({"even": 1.0}, "Nothing to decide: every expert is upgraded."),
    ],
)
def test_the_verdict_is_a_sentence(changed: dict[str, Any], said: str):
    assert str(verdict_of(**changed)).startswith(said)


def test_a_model_says_whether_it_is_worth_it_and_pauses_and_follows_again():
    model = patched(half_life=8)
    rt = model.dynaexq
    tiny.steer(model, MORNING)
    run(model, 6)
    assert rt.verdict().worth_it is None
    assert rt.verdict().following
    long = tiny.prompt(batch=8, length=64)
    for _ in range(LEAST_PATIENCE // long.numel() + 2):
        tiny.logits(model, long)
    assert upgraded(model) == [[0, 1], [2, 3]]
    verdict = rt.verdict()
    assert verdict.worth_it
    assert not verdict.following
    assert verdict.removed > 0.9 > verdict.removed_by_start
    assert "holding still serves as well" in " ".join(str(rt.report()).split())
    tiny.steer(model, EVENING)
    run(model, 12)
    assert upgraded(model) == [[6, 7], [0, 5]]
    assert rt.verdict().following


def test_a_paused_model_still_fills_empty_slots():
    model = patched(half_life=8)
    rt = model.dynaexq
    assert not rt.verdict().following
    rt.set_budget(rt.memory()["total"] + 2 * rt.plan.upgrade.nbytes)
    run(model, 2)
    assert rt.stats()["upgraded"] == rt.stats()["slots"] == 6


def test_one_tier_leaves_nothing_to_decide():
    model = tiny.tiny_qwen3_moe()
    rt = patching.patch(model, AMPLE, tiers=("int4",), quantizer="rtn", update_interval=1)
    run(model, 3)
    assert str(rt.verdict()) == "Nothing to decide: no expert can be upgraded."


def test_the_advantage_is_averaged_over_256_tokens_and_its_doubt_follows_from_the_choices():
    """Two experts of which following has one and the standing choice the other: all of the mass is won, none lost."""
    settings = Settings(hbm_budget=1, policy="topn")
    pause = AutoPause(np.ones((1, 2)), settings)
    first, second = np.array([[True, False]]), np.array([[False, True]])
    pause.review(first, first, frozen=True)
    pause.review(second, first, frozen=True)
    mass, tokens = np.array([[0.0, 64.0]]), np.array([64])
    pause.observe(mass, tokens, first, top_k=2)
    expected = Stance(paused=True).observed(1.0, 64, 0.5 ** (64 / 256), 1.0 / (64 * 2))
    assert pause._stance == expected


def test_what_is_won_and_lost_in_equal_shares_counts_as_well():
    pause = AutoPause(np.ones((1, 2)), Settings(hbm_budget=1, policy="topn"))
    first, second = np.array([[True, False]]), np.array([[False, True]])
    pause.review(first, first, frozen=True)
    pause.review(second, first, frozen=True)
    pause.observe(np.array([[32.0, 32.0]]), np.array([64]), first, top_k=1)
    assert pause._stance == Stance(paused=True).observed(0.0, 64, 0.5 ** (64 / 256), 1.0 / 64)


def test_the_verdict_on_a_model_has_seen_what_any_of_its_parts_has():
    merged = Verdict.merged([verdict_of(tokens=10), verdict_of(tokens=5000)], [1, 1])
    assert merged.tokens == 5000
    assert merged.worth_it


def test_what_the_start_would_have_removed_is_kept_beside_what_was_removed():
    pause = AutoPause(np.ones((1, 2)), Settings(hbm_budget=1, policy="topn"))
    first, second = np.array([[True, False]]), np.array([[False, True]])
    pause.observe(np.array([[1.0, 3.0]]), np.array([4]), first, top_k=1)
    pause.observe(np.array([[1.0, 3.0]]), np.array([4]), second, top_k=1)
    verdict = pause.verdict(second, frozen=False)
    assert verdict.removed_by_start == pytest.approx(0.25)
    assert 0.25 < verdict.removed < 0.75


def test_a_verdict_needs_4096_tokens_and_counts_them_from_none():
    pause, held = AutoPause(np.ones((1, 2)), Settings()), np.array([[True, False]])
    pause.observe(np.array([[4.0, 0.0]]), np.array([4095]), held, top_k=1)
    assert str(pause.verdict(held, frozen=False)) == "Too early to tell: 4,095 of 4,096 tokens were seen."
    pause.observe(np.array([[4.0, 0.0]]), np.array([1]), held, top_k=1)
    assert pause.verdict(held, frozen=False).worth_it


def test_moves_pause_once_the_patience_is_spent_and_not_before():
    def paused_after(tokens: int) -> bool:
        return Stance(paused=False).observed(0.0, tokens, 0.5, 0.0).reviewed(PATIENCE).paused

    assert [paused_after(PATIENCE - 1), paused_after(PATIENCE)] == [False, True]


@pytest.mark.parametrize(("auto_pause", "frozen"), [(True, True), (False, False)])
def test_a_stance_that_may_not_change_does_not(auto_pause: bool, frozen: bool):
    """All of the mass is won by following for a while, then lost: reasons to end a pause, and to begin one."""
    pause = AutoPause(np.ones((1, 2)), Settings(auto_pause=auto_pause))
    first, second = np.array([[True, False]]), np.array([[False, True]])
    before = pause.paused
    pause.review(first, first, frozen=True)
    for won in (True, False):
        pause.review(second, first, frozen)
        for _ in range(2 * LEAST_PATIENCE // 256):
            pause.observe(np.array([[1.0 - won, float(won)]]), np.array([256]), first, top_k=1)
            pause._followed, pause._standing = second, first
            pause.review(second, first, frozen)
            assert pause.paused is before


def test_coverage_is_the_share_of_mass_on_held_experts():
    pause = AutoPause(np.ones((1, 4)), Settings())
    held = np.array([[True, False, False, False]])
    pause.observe(np.array([[8.0, 16.0, 4.0, 4.0]]), np.array([16]), held, top_k=2)
    assert pause.verdict(held, frozen=False).coverage == pytest.approx(8 / 32)
