"""One type of runtime on any number of devices: two devices answer, together, what one answers alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import dynaexq
from dynaexq.errors import BudgetError, ClosedError
from dynaexq.runtime.routing_totals import RoutingTotals
from dynaexq.simulator.simulate import simulate
from dynaexq.traces import Trace

AMPLE = 10**6
BLOCKS = ("model.layers.0.mlp", "model.layers.1.mlp")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    tiny.tiny_qwen3_moe().save_pretrained(directory)
    return directory


@pytest.fixture(params=[("cpu", "cpu:0"), ("cpu:0", "cpu")], ids=["in order", "in reverse"])
def two(source: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose two layers lie on two devices, as far as it knows."""
    devices = {f"{block}.experts": torch.device(name) for block, name in zip(BLOCKS, request.param, strict=True)}
    monkeypatch.setattr("dynaexq.hf.load._device_of", lambda model, layer: devices[layer.name])
    return load(source)


def load(source: Path, **options: Any) -> Any:
    config = dynaexq.DynaExqConfig(
        **{"hbm_budget": AMPLE, "tiers": ("int2", "int4"), "update_interval": 1, "auto_pause": False} | options
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def least_and_slot(runtime: dynaexq.Runtime) -> tuple[int, int]:
    """The least budget of each device, and the bytes of one upgrade."""
    parts = [part.nbytes() for part in runtime.devices]
    return max(sum(part.values()) - part["upgrade"] for part in parts), runtime.plan.upgrade.nbytes


def test_the_runtime_is_of_one_type_and_adds_up(two: Any, source: Path) -> None:
    one, runtime = load(source), two.dynaexq
    assert type(runtime) is type(one.dynaexq) is dynaexq.Runtime
    assert [part.plan.num_layers for part in runtime.devices] == [1, 1]
    assert torch.equal(tiny.logits(two), tiny.logits(one))
    assert runtime.tick()
    assert one.dynaexq.tick()
    for look in ("tiers", "hotness", "routed_mass"):
        np.testing.assert_array_equal(getattr(runtime, look)(), getattr(one.dynaexq, look)())
    assert runtime.plan.tiers == one.dynaexq.plan.tiers
    assert runtime.plan.num_layers == 2
    assert runtime.plan.total == runtime.memory()["total"]
    assert runtime.settings.update_interval == 1
    stats, alone = runtime.stats(), one.dynaexq.stats()
    assert {name: stats[name] for name in ("steps", "ticks", "tokens", "experts", "upgraded", "slots")} == {
        name: alone[name] for name in ("steps", "ticks", "tokens", "experts", "upgraded", "slots")
    }
    assert stats["routed_mass"] == pytest.approx(alone["routed_mass"])
    assert str(runtime.verdict()) == str(one.dynaexq.verdict())
    assert "on 2 devices" in repr(runtime)


def test_hotness_is_saved_by_the_names_of_all_layers(two: Any, source: Path, tmp_path: Path) -> None:
    one, hot = load(source), np.zeros((2, 8))
    hot[0, 3], hot[1, 5] = 0.7, 0.9
    two.dynaexq.warm_start(hot)
    two.dynaexq.save_hotness(tmp_path / "hot.safetensors")
    one.dynaexq.load_hotness(tmp_path / "hot.safetensors")
    np.testing.assert_array_equal(one.dynaexq.hotness(), hot)
    one.dynaexq.warm_start(hot / 2)
    one.dynaexq.save_hotness(tmp_path / "half.safetensors")
    two.dynaexq.load_hotness(tmp_path / "half.safetensors")
    np.testing.assert_array_equal(two.dynaexq.hotness(), hot / 2)


def test_a_trace_holds_all_layers_in_order_and_replays(two: Any, source: Path, tmp_path: Path) -> None:
    one = load(source)
    for model, name in ((two, "two.npz"), (one, "one.npz")):
        with model.dynaexq.trace(tmp_path / name) as recording:
            for seed in range(6):
                tiny.logits(model, tiny.prompt(1, 16, seed))
                if seed == 2:
                    recording.mark("later")
        assert recording.closed
    traces = [Trace(tmp_path / name) for name in ("two.npz", "one.npz")]
    assert traces[0].header.layers == traces[1].header.layers == BLOCKS
    np.testing.assert_allclose(traces[0].header.errors, traces[1].header.errors)
    totals = [sum(window.mass for window in trace.windows()) for trace in traces]
    np.testing.assert_allclose(*totals)
    assert [phase.name for phase in traces[0].phases] == [phase.name for phase in traces[1].phases]
    simulated = simulate(traces[0], dynaexq.settings.Settings(tiers=("int2", "int4")), upgraded=0.25)
    assert simulated.gains_known


def test_a_budget_that_one_device_refuses_changes_none(two: Any) -> None:
    runtime = two.dynaexq
    least, slot = least_and_slot(runtime)
    runtime.set_budget(least + 2 * slot)
    before = runtime.stats(), runtime.memory(), runtime.plan
    with pytest.raises(BudgetError):
        runtime.set_budget(least - 1)
    assert (runtime.stats(), runtime.memory(), runtime.plan) == before
    assert runtime.memory()["budget"] == 2 * (least + 2 * slot)


def test_a_budget_that_fails_half_way_is_taken_back(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = two.dynaexq
    least, slot = least_and_slot(runtime)
    runtime.set_budget(least + 2 * slot)
    before = runtime.plan
    monkeypatch.setattr(runtime.devices[1].pipeline, "resize", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        runtime.set_budget(least + 4 * slot)
    assert runtime.plan == before


def test_freeze_thaw_drain_and_close_reach_every_device(two: Any) -> None:
    runtime = two.dynaexq
    runtime.freeze()
    assert all(part.frozen for part in runtime.devices)
    runtime.thaw()
    assert not any(part.frozen for part in runtime.devices)
    runtime.drain()
    runtime.devices[0].ticks += 7
    assert runtime.stats()["ticks"] == runtime.devices[0].ticks
    with runtime:
        pass
    with pytest.raises(ClosedError):
        runtime.tick()
    assert tiny.logits(two).isfinite().all()


@pytest.mark.parametrize("ran", [(True, False), (False, True), (False, False)])
def test_a_tick_has_run_where_it_ran_on_any_device(two: Any, ran: tuple[bool, bool], monkeypatch: Any) -> None:
    for part, answer in zip(two.dynaexq.devices, ran, strict=True):
        monkeypatch.setattr(part, "tick", lambda answer=answer: answer)
    assert two.dynaexq.tick() is any(ran)


def test_each_device_sees_every_token_and_a_part_of_the_mass() -> None:
    totals = RoutingTotals.merged([RoutingTotals(5, 2.0, 1.0), RoutingTotals(3, 1.0, 0.5)])
    assert totals == RoutingTotals(5, 3.0, 1.5)
