"""The policy: never over capacity, no move without a reason, hotness as defined, plans that fit; and fast.

L layers, E experts per layer, R rows that compete by themselves. Scores are whole numbers, so that ties are common.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from specs import spec

from dynaexq.errors import BudgetError
from dynaexq.planning.budget import TIER_CHOICES, plan_memory, predicted_loss
from dynaexq.policy import decay_by_tokens, prior_hotness, slots_per_row, threshold, top_n, transitions, update_hotness
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.types import Tier, Transition

ALLOCATIONS = ("global", "per_layer")
MARGINS = (0.0, 0.1, 0.5)


@dataclass
class Situation:
    """What a tick decides from: `score, upgraded [L, E]`, `slots [R]` and what they leave free."""

    score: np.ndarray
    upgraded: np.ndarray
    slots: np.ndarray
    hysteresis: float
    max_promotions: int

    def rows(self, table: np.ndarray) -> np.ndarray:
        return table.reshape(len(self.slots), -1)

    @property
    def free(self) -> np.ndarray:
        return self.slots - self.rows(self.upgraded).sum(1)

    def wanted(self) -> np.ndarray:
        wanted = top_n(self.rows(self.score), self.rows(self.upgraded), self.slots, self.hysteresis)
        return wanted.reshape(self.score.shape)

    def moves(self) -> list[Transition]:
        return transitions(self.score, self.upgraded, self.wanted(), self.free, self.max_promotions)

    def applied(self, moves: list[Transition]) -> np.ndarray:
        upgraded = self.upgraded.copy()
        for move in moves:
            assert upgraded[move.layer, move.expert] != move.promote, "a move to where the expert is already"
            upgraded[move.layer, move.expert] = move.promote
        return upgraded


@st.composite
def situations(draw, allocations=ALLOCATIONS, distinct=False):
    """An earlier score chose who is upgraded, and may have left a few slots free; now there is another score."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    size = shape[0] * shape[1]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))  # drawn one by one, most numbers would be equal
    score, earlier = (rng.choice(100 if distinct else 10, (2, *shape), replace=not distinct)).astype(float)
    slots = slots_per_row(draw(st.sampled_from(allocations)), int(rng.integers(0, size + 1)), shape[0])
    held = np.maximum(slots - draw(st.sampled_from([0, 1, 2])), 0)
    rows = earlier.reshape(len(slots), -1)
    upgraded = top_n(rows, np.zeros(rows.shape, dtype=bool), held, 0.0).reshape(shape)
    limit = draw(st.sampled_from([1, 2, size, 0]))
    return Situation(score, upgraded, slots, draw(st.sampled_from(MARGINS)), limit)


@given(situations())
def test_no_row_ever_wants_or_holds_more_than_its_slots(case):
    assert (case.rows(case.wanted()).sum(1) <= case.slots).all()
    assert (case.rows(case.applied(case.moves())).sum(1) <= case.slots).all()


@given(situations())
def test_layers_that_share_their_slots_never_hold_more_than_all_of_them(case):
    moves = transitions(case.score, case.upgraded, case.wanted(), int(case.free.sum()), case.max_promotions)
    assert case.applied(moves).sum() <= case.slots.sum()


@given(situations())
def test_the_wanted_are_the_best_ties_going_to_incumbents_then_to_lower_indices(case):
    for score, upgraded, slots, wanted in zip(
        case.rows(case.score), case.rows(case.upgraded), case.slots, case.rows(case.wanted()), strict=True
    ):
        worth = score * np.where(upgraded, 1 + case.hysteresis, 1)
        best = sorted(range(len(score)), key=lambda e: (-worth[e], not upgraded[e], e))
        assert set(np.flatnonzero(wanted)) == set(best[:slots])


@given(situations())
def test_the_same_situation_gives_the_same_moves_and_is_not_written_to(case):
    before = [table.copy() for table in (case.score, case.upgraded, case.slots)]
    assert case.moves() == case.moves()
    for table, copy in zip((case.score, case.upgraded, case.slots), before, strict=True):
        np.testing.assert_array_equal(table, copy)


@given(situations(allocations=["global"], distinct=True), st.randoms(use_true_random=False))
def test_permuting_the_experts_permutes_the_decisions(case, random):
    worth = np.where(case.upgraded, case.score * (1 + case.hysteresis), case.score)
    assume(len(np.unique(worth)) == worth.size)  # a tie is decided by position
    order = random.sample(range(case.score.size), case.score.size)
    permuted = replace(case, score=case.score.ravel()[order][None], upgraded=case.upgraded.ravel()[order][None])
    np.testing.assert_array_equal(permuted.wanted()[0], case.wanted().ravel()[order])
    num_experts = case.score.shape[1]
    flat = [(move.layer * num_experts + move.expert, move.promote) for move in case.moves()]
    assert flat == [(order[move.expert], move.promote) for move in permuted.moves()]


@given(situations(allocations=["per_layer"]))
def test_the_layers_of_per_layer_decide_as_if_each_were_alone(case):
    wanted = case.wanted()
    for layer, slots in enumerate(case.slots):
        row = slice(layer, layer + 1)
        alone = replace(case, score=case.score[row], upgraded=case.upgraded[row], slots=np.array([slots]))
        np.testing.assert_array_equal(alone.wanted(), wanted[row])


@given(situations())
def test_quiet_traffic_settles_and_then_nothing_moves(case):
    for _ in range(case.score.size + 1):
        case.upgraded = case.applied(case.moves())
    if case.max_promotions:
        assert case.moves() == []
        assert (case.upgraded == case.wanted()).all()


@given(situations())
def test_one_unlimited_tick_is_enough_under_quiet_traffic(case):
    case.max_promotions = case.score.size
    case.upgraded = case.applied(case.moves())
    assert case.moves() == []


@given(situations())
def test_promotions_keep_to_the_limit_and_only_a_needed_slot_is_taken_away(case):
    moves = case.moves()
    promoted, demoted = (np.zeros(case.score.shape, dtype=bool) for _ in range(2))
    for move in moves:
        (promoted if move.promote else demoted)[move.layer, move.expert] = True
    assert promoted.sum() == min(case.max_promotions, (case.wanted() & ~case.upgraded).sum())
    needed = np.maximum(case.rows(promoted).sum(1) - case.free, 0)
    np.testing.assert_array_equal(case.rows(demoted).sum(1), needed)
    assert [move.promote for move in moves] == sorted(move.promote for move in moves)  # slots come free first


@given(situations())
def test_a_newcomer_beats_whom_it_replaces_by_more_than_the_margin(case):
    wanted = case.wanted()
    for row in range(len(case.slots)):
        score, upgraded, chosen = (case.rows(table)[row] for table in (case.score, case.upgraded, wanted))
        for loser in score[upgraded & ~chosen]:
            assert (score[chosen & ~upgraded] > loser * (1 + case.hysteresis)).all()


@pytest.mark.parametrize(("newcomer", "comes_in"), [(1.0, False), (1.1, False), (1.2, True)])
def test_a_margin_of_a_tenth_asks_for_a_tenth(newcomer, comes_in):
    wanted = top_n(np.array([[1.0, newcomer]]), np.array([[True, False]]), np.array([1]), hysteresis=0.1)
    assert wanted.tolist() == [[not comes_in, comes_in]]


def test_the_best_come_first_and_the_coldest_leave_first():
    score = np.array([[5.0, 9.0, 1.0, 2.0], [7.0, 8.0, 0.5, 3.0]])
    upgraded = np.array([[False, False, True, True], [False, False, True, True]])
    moves = transitions(score, upgraded, ~upgraded, free_slots=0, max_promotions=2)
    assert moves == [
        Transition(1, 2, promote=False),
        Transition(0, 2, promote=False),
        Transition(0, 1, promote=True),
        Transition(1, 1, promote=True),
    ]
    # With slots of their own, no layer takes from the other: layer 1 would have given up both.
    score[0, 2:] = 4.0
    assert transitions(score, upgraded, ~upgraded, np.array([0, 0]), 2)[:2] == [
        Transition(1, 2, promote=False),
        Transition(0, 2, promote=False),
    ]


@given(situations(), st.integers(0, 6), st.integers(0, 6), st.data())
def test_the_threshold_rule_admits_the_hot_and_keeps_the_lukewarm(case, first, second, data):
    tau_c, tau_h = sorted((first, second))
    hotness = data.draw(arrays(float, case.score.shape, elements=st.integers(0, 7)))
    args = (case.rows(case.score), case.rows(case.upgraded), case.slots, case.rows(hotness), tau_h, tau_c)
    wanted = threshold(*args).reshape(case.score.shape)
    qualified = (hotness > tau_h) | (case.upgraded & (hotness >= tau_c))
    assert not (wanted & ~qualified).any()
    np.testing.assert_array_equal(
        case.rows(wanted).sum(1), np.minimum(case.rows(qualified).sum(1), case.slots), "all that fit are taken"
    )
    for row in range(len(case.slots)):
        score, chosen, left = (case.rows(table)[row] for table in (case.score, wanted, qualified & ~wanted))
        assert not left.any() or score[chosen].min(initial=np.inf) >= score[left].max()


def test_between_the_thresholds_an_expert_stays_what_it_is():
    hotness = np.array([[0.4, 0.4, 0.6, 0.1]])
    upgraded = np.array([[True, False, False, True]])
    wanted = threshold(hotness, upgraded, np.array([4]), hotness, tau_h=0.5, tau_c=0.2)
    assert wanted.tolist() == [[True, False, True, False]]


@given(st.integers(0, 200), st.integers(1, 20))
def test_slots_are_dealt_out_to_the_last_and_evenly(slots, num_layers):
    assert slots_per_row("global", slots, num_layers).tolist() == [slots]
    shares = slots_per_row("per_layer", slots, num_layers)
    assert len(shares) == num_layers
    assert shares.sum() == slots
    assert np.ptp(shares) <= 1


tokens = st.integers(1, 10**6)


@given(st.floats(1.0, 1e5), st.floats(0.0, 1.0))
def test_after_a_half_life_of_silence_exactly_half_remains(half_life, hotness):
    keep = decay_by_tokens(np.array([half_life]), half_life)
    after = update_hotness(np.array([[hotness]]), np.zeros((1, 1)), np.array([half_life]), keep)
    assert after == 0.5 * hotness


@given(tokens, tokens, st.floats(1.0, 1e5))
def test_two_silent_drains_equal_one(first, second, half_life):
    def silent(hotness: np.ndarray, count: int) -> np.ndarray:
        seen = np.array([count])
        return update_hotness(hotness, np.zeros((1, 3)), seen, decay_by_tokens(seen, half_life))

    hotness = np.array([[0.2, 0.3, 0.5]])
    np.testing.assert_allclose(
        silent(silent(hotness, first), second), silent(hotness, first + second), rtol=1e-9, atol=1e-300
    )


def test_hotness_is_the_average_the_paper_defines():
    alpha, steps = 0.9, 3
    hotness, mass, seen = np.array([[0.5, 0.1]]), np.array([[3.0, 0.0]]), np.array([4])
    after = update_hotness(hotness, mass, seen, np.array([alpha**steps]))
    expected = [alpha**steps * 0.5 + (1 - alpha**steps) * 3 / 4, alpha**steps * 0.1]
    np.testing.assert_allclose(after, [expected], rtol=1e-12)


def test_a_layer_that_saw_no_token_keeps_its_hotness():
    hotness = prior_hotness(2, 4)
    after = update_hotness(hotness, np.zeros((2, 4)), np.array([0, 8]), np.array([0.5, 0.5]))
    np.testing.assert_array_equal(after[0], hotness[0])
    np.testing.assert_array_equal(after[1], hotness[1] / 2)


def test_every_expert_starts_equal_and_a_layer_holds_one_token_of_mass():
    np.testing.assert_allclose(prior_hotness(3, 64).sum(1), 1.0)
    assert np.ptp(prior_hotness(3, 64)) == 0


@st.composite
def plannable(draw):
    """A spec of any sizes; budgets are drawn round what it needs."""
    sizes = st.integers(1, 10**4)
    choices = draw(st.lists(st.sampled_from(TIER_CHOICES), min_size=1, max_size=4, unique=True))
    pairs = [tuple(Tier(name, draw(sizes)) for name in tiers) for tiers in choices]
    return spec(
        [(pair[0], pair[1] if len(pair) > 1 else None) for pair in pairs],
        num_layers=draw(st.integers(1, 5)),
        num_experts=draw(st.integers(1, 16)),
        dense=draw(st.integers(0, 10**5)),
        workspace=draw(st.integers(0, 10**4)),
    )


def least(of):
    return min(of.weights(base) for base, _ in of.choices)


@given(plannable(), st.integers(1, 10**6))
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_fits(model, missing):
    needed = least(model)
    for budget in {needed - 1, max(0, needed - missing)}:
        with pytest.raises(BudgetError, match=f"raise hbm_budget to at least {needed}") as caught:
            plan_memory(model, budget)
        assert (caught.value.budget, caught.value.least) == (budget, needed)
    assert plan_memory(model, needed).total == needed


@given(plannable(), st.integers(0, 10**6))
def test_a_plan_fits_and_leaves_no_slot_out_that_would(model, spare):
    budget = least(model) + spare
    plan = plan_memory(model, budget)
    assert (plan.base, plan.upgrade) in model.choices
    assert plan.total <= plan.budget == budget
    if plan.upgrade:
        experts = plan.num_layers * plan.num_experts
        assert 0 <= plan.num_slots <= experts
        assert plan.num_slots == experts or plan.total + plan.upgrade.nbytes > budget


@given(plannable(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_budget_never_predicts_more_loss(model, spare, more):
    def loss(budget: int) -> float:
        plan = plan_memory(model, budget)
        share = plan.num_slots / (plan.num_layers * plan.num_experts)
        return predicted_loss(plan.base.precision, plan.upgrade and plan.upgrade.precision, share)

    budget = least(model) + spare
    assert loss(budget + more) <= loss(budget) + 1e-12


@pytest.mark.parametrize(("base", "upgrade"), [tiers for tiers in TIER_CHOICES if len(tiers) == 2])
def test_no_upgrades_predict_the_loss_of_the_base_and_all_upgrades_that_of_the_upgrade(base, upgrade):
    assert predicted_loss(base, upgrade, 1.0) == predicted_loss(upgrade, None, 0.0)
    alone, shared = predicted_loss(base, None, 0.0), predicted_loss(base, upgrade, 0.0)
    assert shared > alone if base in ("int2", "int3") else shared == alone  # few bits of a shared code are dearer


INT2, INT4, INT8 = Tier("int2", 1000), Tier("int4", 1800), Tier("int8", 3400)


@pytest.mark.parametrize(
    ("budget", "tiers"),
    [
        (100_000, ("int2",)),
        (130_000, ("int2", "int4")),
        (180_000, ("int4",)),
        (250_000, ("int4", "int8")),
        (340_000, ("int8",)),
    ],
)
def test_each_budget_gets_the_ladder_that_serves_it_best(budget, tiers):
    refined = [(INT2, Tier("int4", 800)), (INT4, Tier("int8", 1600))]
    choices = refined + [(base, None) for base in (INT2, INT4, INT8)]
    assert plan_memory(spec(choices, 10, 10), budget).tiers == tiers


def test_a_refused_plan_says_what_it_needs_and_which_ladder_would_fit():
    with pytest.raises(BudgetError) as caught:
        plan_memory(
            spec(
                [(Tier("fp16", 6400), None), (INT8, Tier("fp16", 6400))],
                num_layers=10,
                num_experts=10,
                dense=5000,
                workspace=1000,
                offered=[(INT8, None), (INT4, None), (INT2, None)],
            ),
            budget=200_000,
        )
    assert caught.value.least == 346_000
    assert str(caught.value) == (
        "hbm_budget of 200,000 bytes is too small: 5,000 of dense weights, 1,000 of workspace and 100 experts at int8 "
        'need 346,000; raise hbm_budget to at least 346000, or take tiers=("int4",), which fits'
    )


def fastest(action: Callable[[], object]) -> float:
    """Seconds; of many runs the fastest, as a shared machine may pause at any of them."""

    def once() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return min(once() for _ in range(30))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("num_experts", [128, 512])
def test_a_decision_over_48_layers_costs_no_more_than_sorting_the_scores_a_few_times(num_experts, allocation):
    """`benchmarks/policy/policy_speed.py` has the milliseconds; a slow machine sorts slowly, too."""
    score = np.random.default_rng(0).gamma(0.5, size=(48, num_experts))
    slots = slots_per_row(allocation, score.size // 5, 48)
    upgraded = top_n(score.reshape(len(slots), -1), np.zeros((len(slots), score.size // len(slots)), bool), slots, 0.0)
    drifted = score * np.random.default_rng(1).uniform(0.5, 1.5, score.shape)
    case = Situation(drifted, upgraded.reshape(score.shape), slots, hysteresis=0.1, max_promotions=64)
    deciding = fastest(case.moves)
    sorting = fastest(lambda: np.argsort(-drifted, axis=None, kind="stable"))
    assert sum(move.promote for move in case.moves()) == 64
    assert deciding < 10 * sorting


@pytest.mark.parametrize(("slot_nbytes", "promotions"), [(0, 64 * 2**20), (2**20, 64), (64 * 2**20, 1), (2**30, 1)])
def test_without_a_rate_a_tick_may_copy_64_mib_and_one_expert_at_least(slot_nbytes, promotions):
    assert CopyRateLimiter(None, slot_nbytes).promotions() == promotions


def test_a_budget_that_is_too_small_names_float32_where_that_is_the_reason():
    model = spec([(Tier("int4", 1024), None)], 2, 4, dense=4096)
    with pytest.raises(BudgetError, match=r"4,096 of dense weights in float32 \(dtype=torch.bfloat16 takes half\), "):
        plan_memory(replace(model, dtype="float32"), 10)
    with pytest.raises(BudgetError, match=r"4,096 of dense weights, "):
        plan_memory(model, 10)
