"""Experts that are pinned stay where they are put, and a policy can be changed while the model runs."""

from typing import Any

import numpy as np
import pytest
import tiny
from shifting import EVENING, MORNING, assert_answers_as_published, patched, run, upgraded
from torch import nn

import dynaexq
from dynaexq.errors import ClosedError, SettingsError

UP, DOWN = (1, 6), (0, 0)


def kept_by(policy: Any) -> dict[str, Any]:
    return {"policy": policy, "auto_pause": False} | ({"tau_h": 0.2, "tau_c": 0.1} if policy == "threshold" else {})


def evenly(score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
    """A policy of a user's own, which knows no pins."""
    wanted = np.zeros(score.size, dtype=bool)
    wanted[np.argsort(-score, axis=None, kind="stable")[:slots]] = True
    return wanted.reshape(score.shape)


@pytest.mark.parametrize("allocation", ["global", "per_layer"])
@pytest.mark.parametrize("policy", ["topn", "threshold", "frozen", evenly])
def test_what_is_pinned_stays_through_any_traffic(policy: Any, allocation: str) -> None:
    model = patched(allocation=allocation, **kept_by(policy))
    runtime = model.dynaexq
    runtime.pin(*UP, "int4")
    runtime.pin(*DOWN, "int2")
    for routes in (MORNING, EVENING, MORNING):
        assert runtime.tiers()[UP] == 4
        assert runtime.tiers()[DOWN] == 2
        assert runtime.stats()["upgraded"] <= 4
        tiny.steer(model, routes)
        run(model)
    original = tiny.tiny_qwen3_moe(dtype=next(model.parameters()).dtype, moe_intermediate_size=64)
    tiny.steer(model, None)
    assert_answers_as_published(model, original)


def test_an_expert_that_is_let_go_follows_the_traffic_again() -> None:
    model = patched(auto_pause=False)
    model.dynaexq.pin(*UP, "int4")
    model.dynaexq.pin(*UP, None)
    assert model.dynaexq.tiers()[UP] == 4, "it keeps its upgrade until another expert wants the slot"
    tiny.steer(model, MORNING)
    run(model, 6)
    assert upgraded(model) == [[0, 1], [2, 3]]


def test_pins_outlive_budgets_and_never_break_them() -> None:
    model = patched(auto_pause=False)
    runtime = model.dynaexq
    runtime.pin(*UP, "int4")
    full, slot = runtime.plan.budget, runtime.plan.upgrade.nbytes
    for slots_fewer in (2, 4, 0):
        runtime.set_budget(full - slots_fewer * slot)
        run(model, 3)
        memory = runtime.memory()
        assert memory["total"] <= memory["budget"]
        assert (runtime.tiers()[UP] == 4) == (slots_fewer < 4)


@pytest.mark.parametrize("allocation", ["global", "per_layer"])
def test_more_pins_than_slots_are_refused_and_change_nothing(allocation: str) -> None:
    model = patched(allocation=allocation)
    runtime = model.dynaexq
    for expert in range(2):
        runtime.pin(0, expert, "int4")
        runtime.pin(1, expert, "int4")
    before = runtime.tiers()
    with pytest.raises(SettingsError, match=r"all \d slots that it could have are pinned"):
        runtime.pin(0, 5, "int4")
    np.testing.assert_array_equal(runtime.tiers(), before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((2, 0, "int4"), "layer below 2"), ((0, 8, "int4"), "expert below 8"), ((0, 0, "int8"), "expected a tier")],
)
def test_a_wrong_pin_is_refused_by_name(arguments: tuple[int, int, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        patched().dynaexq.pin(*arguments)


def test_a_policy_is_changed_while_the_model_runs() -> None:
    model = patched(policy="frozen")
    runtime, block = model.dynaexq, tiny.sparse_blocks(model)[0]
    tiny.steer(model, EVENING)
    run(model)
    before = upgraded(model)
    learned = runtime.hotness()
    runtime.set_policy("topn", auto_pause=False, hysteresis=0.0)
    assert runtime.settings.policy == "topn"
    assert block.tracker is runtime.devices[0].control.tracker
    np.testing.assert_allclose(runtime.hotness(), learned)
    run(model)
    assert upgraded(model) == [[6, 7], [0, 5]] != before
    runtime.set_policy("frozen")
    tiny.steer(model, MORNING)
    run(model)
    assert upgraded(model) == [[6, 7], [0, 5]]
    runtime.set_policy("threshold", tau_h=0.2, tau_c=0.1)
    runtime.set_policy(evenly, alpha=0.5, update_interval=2)
    assert (runtime.settings.tau_h, runtime.settings.half_life, runtime.settings.alpha) == (None, None, 0.5)


def test_pins_and_kinds_outlive_a_change_of_policy() -> None:
    model = patched(num_kinds=4, half_life=64, auto_pause=False)
    runtime = model.dynaexq
    runtime.pin(*UP, "int4")
    tiny.steer(model, MORNING)
    run(model, 40)
    learned = runtime.devices[0].control.tracker.learned
    runtime.set_policy("topn", hysteresis=0.1)
    np.testing.assert_array_equal(runtime.devices[0].control.tracker.learned.tokens, learned.tokens)
    run(model)
    assert runtime.tiers()[UP] == 4


def test_a_change_that_cannot_be_is_refused_and_changes_nothing() -> None:
    model = patched()
    runtime = model.dynaexq
    before = runtime.settings
    for policy, options in (("nonsense", {}), ("topn", {"tiers": ("int4",)}), ("topn", {"hysteresis": -1.0})):
        with pytest.raises(SettingsError):
            runtime.set_policy(policy, **options)
    assert runtime.settings is before
    runtime.close()
    for act in (lambda: runtime.pin(0, 0, "int4"), lambda: runtime.set_policy("topn")):
        with pytest.raises(ClosedError):
            act()


def test_one_precision_can_be_pinned_to_itself() -> None:
    model: nn.Module = tiny.tiny_qwen3_moe()
    runtime = dynaexq.patch(model, "1GiB", tiers=("int4",))
    runtime.pin(0, 0, "int4")
    assert (runtime.tiers() == 4).all()
