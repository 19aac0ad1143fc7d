"""A replay decides as the model did; at full scale a shift is followed in time and flat traffic is left alone."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from shifting import EVENING, MORNING, patched, run
from typer.testing import CliRunner

from dynaexq.cli.app import app
from dynaexq.errors import BudgetError, SettingsError, TraceError
from dynaexq.settings import Settings
from dynaexq.simulator.replay import ImaginedSlots, Machine, Replicas, replay
from dynaexq.simulator.simulate import gains, parse_options, provided, simulate
from dynaexq.traces import WORKLOADS, Phase, Trace, TraceWindow, generate
from dynaexq.types import Transition

INSTANT = math.inf


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"auto_pause": False, "hysteresis": 0.0, "half_life": 4},
        {"half_life": None, "alpha": 0.5, "auto_pause": False},
        {"allocation": "per_layer"},
        {"policy": "threshold", "tau_h": 0.4, "tau_c": 0.1},
        {"policy": "frozen"},
    ],
    ids=str,
)
def test_a_replay_decides_as_the_model_did(tmp_path: Path, options: dict[str, Any]) -> None:
    model = patched(**options)
    rt = model.dynaexq
    filled = rt.stats()["promotions"]
    with rt.trace(tmp_path / "a.npz"):
        for routes in (MORNING, None, EVENING):
            tiny.steer(model, routes)
            run(model, 6)
        rt.tick()
    trace = Trace(tmp_path / "a.npz")
    machine = Machine(4, rt.plan.upgrade.nbytes, INSTANT, 1.0)
    gain, known = gains(trace.header, rt.plan.tiers)
    assert known
    outcome = replay(trace, gain, machine, rt.settings)
    assert outcome.promotions.sum() == rt.stats()["promotions"] - filled
    assert sum(outcome.tracks["policy"].mass) == pytest.approx(rt.stats()["hot_mass"], rel=1e-5)
    assert outcome.verdict.following is rt.verdict().following
    assert outcome.verdict.removed == pytest.approx(rt.verdict().removed, rel=1e-4)


@pytest.fixture(scope="module")
def shifting(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("traces") / "shifting.npz"
    generate(path, WORKLOADS["qwen3-30b"], tokens_a_phase=2400, num_phases=2)
    return Trace(path)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("traces") / "flat.npz"
    generate(path, WORKLOADS["flat"], tokens_a_phase=4400, num_phases=1)
    return Trace(path)


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "int8")], ids="-".join)
def test_a_shift_is_followed_within_2000_tokens_on_a_tenth_of_the_link(
    shifting: Trace, tiers: tuple[str, str]
) -> None:
    settings = Settings(tiers=tiers, copy_rate_limit=0.1)
    outcome = simulate(shifting, settings, upgraded=0.2, link=25e9).outcome
    phase = outcome.phases[1]
    assert outcome.tokens_to(0.9, phase) <= 2000
    late = outcome.coverage("policy", phase.end - 75, phase.end)
    assert late > 0.9 * outcome.coverage("phase", phase.end - 75, phase.end)
    assert late > outcome.coverage("average", phase.end - 75, phase.end)
    assert outcome.verdict.worth_it


def test_a_link_that_is_too_slow_delays_what_is_followed(shifting: Trace) -> None:
    settings = Settings(tiers=("int2", "int4"), copy_rate_limit=0.1)
    fast, slow = (simulate(shifting, settings, 0.2, link=link).outcome for link in (25e9, 25e7))
    assert slow.coverage("policy") < fast.coverage("policy") - 0.01
    seconds = slow.tokens.sum() / slow.machine.tokens_per_second
    moved = slow.promotions.sum() * slow.machine.slot_nbytes
    assert moved <= 0.1 * 25e7 * (seconds + 1) + slow.machine.slot_nbytes


def test_flat_traffic_is_left_alone_and_not_worth_it(flat: Trace) -> None:
    figures = simulate(flat, Settings(tiers=("int2", "int4"), copy_rate_limit=0.1), upgraded=0.2).figures()
    assert figures["moves_per_1000_tokens_per_slot"] <= 0.01
    assert figures["verdict"]["worth_it"] is False
    churning = simulate(flat, Settings(tiers=("int2", "int4"), auto_pause=False), upgraded=0.2).figures()
    assert churning["moves_per_1000_tokens_per_slot"] > 0.1, "nothing to suppress: the traffic tests nothing"


def test_moves_pause_while_nothing_changes_and_a_shift_ends_the_pause_at_once(tmp_path: Path) -> None:
    workload = replace(WORKLOADS["qwen3-30b"], num_layers=8, drift=0.0, locality=0.0)
    generate(tmp_path / "a.npz", workload, tokens_a_phase=9000, num_phases=2)
    outcome = simulate(Trace(tmp_path / "a.npz"), Settings(tiers=("int2", "int4")), upgraded=0.2).outcome
    shift = outcome.phases[1].first
    assert outcome.paused[shift - 20 : shift].all()
    assert outcome.promotions[shift - 20 : shift].sum() == 0
    assert not outcome.paused[shift + 40], "320 tokens later"
    assert outcome.tokens_to(0.9, outcome.phases[1]) <= 2000


def test_yardsticks_keep_their_order(shifting: Trace) -> None:
    outcome = simulate(shifting, Settings(tiers=("int2", "int4"), policy="frozen"), upgraded=0.2).outcome
    start, average, phase, window = (outcome.removed(name) for name in ("start", "average", "phase", "window"))
    assert start < average < phase < window
    assert outcome.removed("policy") == start  # frozen is the choice made at the start
    assert outcome.promotions.sum() == 0


def test_slots_are_never_oversubscribed_and_copies_take_the_time_of_the_link() -> None:
    slots = ImaginedSlots(Machine(2, 100, link=100.0, tokens_per_second=1.0), (1, 4))
    promote = [Transition(0, expert, promote=True) for expert in range(4)]
    assert [slots.submit(move) for move in promote] == [True, True, False, False]
    assert not slots.submit(promote[0])
    for now, published in ((0.9, []), (1.0, [0]), (1.9, [0]), (2.0, [0, 1])):
        slots.now = now
        slots.settle()
        assert np.flatnonzero(slots.published[0]).tolist() == published
    assert not slots.submit(Transition(0, 3, promote=False))  # it holds nothing
    assert slots.submit(Transition(0, 0, promote=False))
    assert slots.num_free == 1
    assert not slots.published[0, 0]


def test_an_expert_on_its_way_cannot_be_demoted() -> None:
    slots = ImaginedSlots(Machine(1, 100, link=1.0, tokens_per_second=1.0), (1, 2))
    slots.submit(Transition(0, 0, promote=True))
    assert not slots.submit(Transition(0, 0, promote=False))
    assert slots.upgraded[0, 0]
    assert not slots.published[0, 0]


def test_a_budget_buys_slots_of_the_size_the_codec_gives(shifting: Trace) -> None:
    settings = Settings(hbm_budget="15GB", tiers=("int2", "int4"))
    machine = simulate(shifting, settings).outcome.machine
    assert machine.slot_nbytes == 3 * 2048 * 768 // 4  # two bits per weight
    spare = 15e9 - shifting.header.dense - 48 * 128 * (3 * 2048 * 768 // 4 + 3 * 2048 * 768 // 64 * 2)
    assert machine.num_slots == pytest.approx(spare / machine.slot_nbytes, rel=0.01)


@pytest.mark.parametrize(
    ("options", "upgraded", "error", "match"),
    [
        ({}, None, SettingsError, "give a budget"),
        ({}, 0.2, SettingsError, "needs two tiers"),
        ({"tiers": ("int2", "int4")}, 1.5, SettingsError, r"must lie in \(0, 1\], got 1.5"),
        ({"hbm_budget": "1TB"}, None, SettingsError, "best spent on one tier, fp16"),
        ({"hbm_budget": "1GB"}, None, BudgetError, "too small"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    shifting: Trace, options: dict[str, Any], upgraded: float | None, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        simulate(shifting, Settings(**options), upgraded)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with patched().dynaexq.trace(tmp_path / "a.npz"):
        pass
    with pytest.raises(TraceError, match=r"a\.npz holds no window"):
        simulate(Trace(tmp_path / "a.npz"), Settings(tiers=("int2", "int4")), upgraded=0.25)


def test_dials_are_parsed_and_traces_are_named() -> None:
    assert parse_options(["half_life=256", "allocation=per_layer", "auto_pause=false"]) == {
        "half_life": 256,
        "allocation": "per_layer",
        "auto_pause": False,
    }
    with pytest.raises(SettingsError, match="an option is written name=value, got 'hysteresis'"):
        parse_options(["hysteresis"])
    for path, workload, match in ((None, None, "name a trace"), (None, "gpt", "there is no workload 'gpt'")):
        with pytest.raises(SettingsError, match=match), provided(path, workload, 8, 1, 8, 0):
            pass


def test_the_command_replays_a_file_and_writes_its_figures(tmp_path: Path) -> None:
    model = patched()
    with model.dynaexq.trace(tmp_path / "a.npz"):
        run(model, 8)
    command = ["simulate", str(tmp_path / "a.npz"), "--tiers", "int2,int4", "--upgraded", "0.25"]
    command += ["--option", "half_life=8", "--link", "1GB"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "Too early to tell" in shown.output
    figures = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).output)
    assert figures["gains_known"]
    assert figures["machine"]["num_slots"] == 4
    assert figures["trace"]["tokens"] == sum(phase["tokens"] for phase in figures["phases"]) == 7 * 24
    assert figures["timeline"][-1]["tokens"] == 7 * 24


def test_replicas_alone_see_less_and_follow_later_and_being_told_of_the_others_makes_up_for_it(
    shifting: Trace,
) -> None:
    settings = Settings(tiers=("int2", "int4"), copy_rate_limit=0.1)
    fleets = {"one": Replicas(), "alone": Replicas(8), "told": Replicas(8, exchange_every=128)}
    removed = {
        name: simulate(shifting, settings, upgraded=0.2, replicas=fleet).outcome.removed("policy")
        for name, fleet in fleets.items()
    }
    assert removed["alone"] + 0.05 < removed["told"] < removed["one"]


def test_each_replica_decides_by_its_own_requests_alone() -> None:
    """Two kinds of request in turn: two replicas meet one kind each, and hold what it needs."""
    mass = np.zeros((2, 1, 8))
    mass[0, 0, :2] = mass[1, 0, 4:6] = 8.0
    windows = [TraceWindow(mass[i // 4 % 2], np.array([16]), 16) for i in range(400)]
    machine, settings = Machine(2, 256, INSTANT, 1.0), Settings(tiers=("int2", "int4"), auto_pause=False, half_life=16)
    gain, trace = np.ones((1, 8)), listed(windows)
    apart = replay(trace, gain, machine, settings, Replicas(2, request_tokens=64))
    assert apart.coverage("policy", 100) == 1.0
    assert replay(trace, gain, machine, settings).coverage("policy", 100) < 0.9


def listed(windows: list[TraceWindow]) -> Any:
    """What a replay asks of a trace, from memory."""
    header = SimpleNamespace(shape=windows[0].mass.shape, top_k=1)
    phases = [Phase("all", 0, len(windows))]
    return SimpleNamespace(
        header=header, phases=phases, num_windows=len(windows), windows=lambda: iter(windows), path="memory"
    )
