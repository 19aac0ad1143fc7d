"""Traces: what is written is read, what is broken is refused, and what is made up has the statistics it claims."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from shifting import EVENING, MORNING, patched, run

from dynaexq.errors import ClosedError, TraceError
from dynaexq.traces import WORKLOADS, Phase, Trace, TraceHeader, TraceWindow, TraceWriter, generate
from dynaexq.traces.synthetic import Workload, _Traffic
from dynaexq.traces.trace_file import WINDOWS_A_CHUNK
from dynaexq.types import ExpertShape


def header(num_layers: int = 2, num_experts: int = 5) -> TraceHeader:
    return TraceHeader(tuple(f"layer {i}" for i in range(num_layers)), num_experts, top_k=2)


@settings(max_examples=25)
@given(st.integers(0, 150), st.integers(1, 3), st.sampled_from([1, 7, 40_000]), st.integers(0, 99))
def test_every_window_comes_back(tmp_path_factory, num_windows, num_layers, num_experts, seed):
    num_windows = min(num_windows, 3) if num_experts > 7 else num_windows
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("trace") / "a.npz"
    windows = []
    with TraceWriter(path, header(num_layers, num_experts)) as writer:
        for _ in range(num_windows):
            shape = num_layers, num_experts
            mass = (rng.random(shape, dtype=np.float32) * (rng.random(shape) < 0.3)).astype(float)
            windows.append(TraceWindow(mass, rng.integers(0, 9, num_layers), int(rng.integers(1, 9))))
            writer.add(windows[-1])
    trace = Trace(path)
    assert trace.num_windows == num_windows
    for _ in range(2):  # as often as one likes
        for window, expected in zip(trace.windows(), windows, strict=True):
            np.testing.assert_array_equal(window.mass, expected.mass)
            np.testing.assert_array_equal(window.tokens, expected.tokens)
            assert window.steps == expected.steps


def test_the_header_comes_back(tmp_path):
    errors = np.random.default_rng(0).random((2, 5, 2)).astype(np.float32)
    written = replace(
        header(), tiers=("int2", "int4"), errors=errors, expert=ExpertShape(64, 32, 64, True, False), dense=9
    )
    with TraceWriter(tmp_path / "a.npz", written):
        pass
    found = Trace(tmp_path / "a.npz").header
    np.testing.assert_array_equal(found.errors, errors)
    assert replace(found, errors=None) == replace(written, errors=None)
    assert found.shape == (2, 5)


def test_phases_begin_where_they_are_marked(tmp_path):
    window = TraceWindow(np.ones((2, 5)), np.ones(2, dtype=int), 1)
    with TraceWriter(tmp_path / "a.npz", header()) as writer:
        for name, count in (("", 2), ("text", 3), ("empty", 0), ("code", WINDOWS_A_CHUNK)):
            if name:
                writer.mark(name)
            for _ in range(count):
                writer.add(window)
    end = 5 + WINDOWS_A_CHUNK
    assert Trace(tmp_path / "a.npz").phases == [Phase("start", 0, 2), Phase("text", 2, 5), Phase("code", 5, end)]


def test_no_more_than_a_chunk_is_held(tmp_path):
    with TraceWriter(tmp_path / "a.npz", header()) as writer:
        for _ in range(3 * WINDOWS_A_CHUNK):
            writer.add(TraceWindow(np.ones((2, 5)), np.ones(2, dtype=int), 1))
            assert len(writer._pending) < WINDOWS_A_CHUNK


def spoilt(path: Path, how: str) -> None:
    with TraceWriter(path, header()) as writer:
        writer.add(TraceWindow(np.ones((2, 5)), np.ones(2, dtype=int), 1))
    whole = path.read_bytes()
    if how == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "text":
        path.write_text("not an archive")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        np.savez(path, weights=np.ones(3))


@pytest.mark.parametrize("how", ["cut off", "text", "empty", "other arrays"])
def test_what_is_no_trace_is_refused(tmp_path, how):
    spoilt(tmp_path / "a.npz", how)
    with pytest.raises(TraceError, match=r"a\.npz is not a routing trace, or its recording was cut off"):
        Trace(tmp_path / "a.npz")


def test_a_later_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dynaexq.traces.trace_file.VERSION", 2)
    spoilt(tmp_path / "a.npz", "other arrays")
    with TraceWriter(tmp_path / "a.npz", header()):
        pass
    monkeypatch.undo()
    with pytest.raises(TraceError, match="has format version 2, and this dynaexq reads up to 1"):
        Trace(tmp_path / "a.npz")


def test_a_model_is_recorded_while_it_runs(tmp_path):
    model = patched(update_interval=2)
    rt = model.dynaexq
    run(model, 3)
    before = rt.routed_mass()
    rt.tick()
    with rt.trace(tmp_path / "a.npz") as recording:
        for name, routes in (("morning", MORNING), ("evening", EVENING)):
            recording.mark(name)
            tiny.steer(model, routes)
            run(model, 6)
            rt.tick()
    run(model, 4)  # no longer recorded
    trace = Trace(tmp_path / "a.npz")
    windows = list(trace.windows())
    assert [phase.name for phase in trace.phases] == ["morning", "evening"]
    assert sum(window.steps for window in windows) == 12
    assert sum(window.tokens[0] for window in windows) == 12 * 24
    expected = np.zeros((2, 8))
    for routes in (MORNING, EVENING):
        for layer, (pair,) in enumerate(routes):
            expected[layer, pair] += 6 * 24 * 0.5
    np.testing.assert_allclose(sum(window.mass for window in windows), expected)
    assert before.sum() > 0
    found = trace.header
    assert (found.layers, found.top_k, found.tiers) == (("model.layers.0.mlp", "model.layers.1.mlp"), 2, rt.plan.tiers)
    np.testing.assert_allclose(found.errors, rt.devices[0].errors, rtol=1e-6)
    assert found.dense == rt.memory()["dense"]


def test_one_recording_at_a_time_and_none_of_a_closed_runtime(tmp_path):
    rt = patched().dynaexq
    with (
        rt.trace(tmp_path / "a.npz"),
        pytest.raises(TraceError, match=r"a\.npz is still being recorded; close that recording first"),
    ):
        rt.trace(tmp_path / "b.npz")
    with pytest.raises(OSError, match=r"there is no directory .* make it first"):
        rt.trace(tmp_path / "nowhere" / "a.npz")
    rt.trace(tmp_path / "b.npz")
    rt.close()
    assert Trace(tmp_path / "b.npz").num_windows == 0  # closing the runtime has finished the file
    with pytest.raises(ClosedError):
        rt.trace(tmp_path / "c.npz")


def test_a_full_disk_ends_the_recording_and_not_the_generation(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    model = patched()
    with model.dynaexq.trace(tmp_path / "a.npz") as recording:
        monkeypatch.setattr(TraceWriter, "add", full)
        answer = run(model, 4)
        assert recording.closed
    assert answer.isfinite().all()
    assert sum("given up" in record.message for record in caplog.records) == 1


def test_the_same_seed_makes_the_same_trace_and_another_one_does_not(tmp_path):
    small = replace(WORKLOADS["qwen3-30b"], num_layers=2, num_experts=16, top_k=3)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate(tmp_path / f"{name}.npz", small, 50, 2, window=8, seed=seed)
    a, b, c = (np.stack([w.mass for w in Trace(tmp_path / f"{name}.npz").windows()]) for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    tokens = [window.tokens[0] for window in Trace(tmp_path / "a.npz").windows()]
    assert tokens == [8] * 6 + [2] + [8] * 6 + [2]
    np.testing.assert_allclose(a.sum(2), np.repeat(tokens, 2).reshape(-1, 2), rtol=1e-5)


def drawn(workload: Workload, tokens: int, phases: int) -> tuple[np.ndarray, np.ndarray]:
    """Mass `[phases, tokens, L, E]` and where it is not zero."""
    traffic = _Traffic(replace(workload, num_layers=6), np.random.default_rng(0))
    mass = np.stack([[traffic.window(phase, 1).mass for _ in range(tokens)] for phase in range(phases)])
    return mass, mass > 0


def covered(chosen_by: np.ndarray, mass: np.ndarray, share: float = 0.2) -> float:
    """Share of `mass` on the experts that are the hottest fifth of all by `chosen_by`."""
    best = np.argsort(-chosen_by.ravel())[: int(share * mass.size)]
    return float(mass.ravel()[best].sum() / mass.sum())


def test_made_up_traffic_of_128_experts_covers_drifts_and_overlaps_as_measured():
    mass, _ = drawn(WORKLOADS["qwen3-30b"], tokens=1500, phases=3)
    phases = mass.sum(1)
    frozen, oracle = (np.mean([covered(by, phase) for phase, by in zip(phases, sets, strict=True)])
                      for sets in ([phases.sum(0)] * 3, phases))  # fmt: skip
    assert 0.52 <= frozen <= 0.60
    assert 0.67 <= oracle <= 0.73
    short = mass[:, :1408].reshape(3, 11, 128, *mass.shape[2:]).sum(2)
    step = np.mean([covered(block, block) for phase in short for block in phase])
    assert 0.005 <= step - oracle <= 0.035
    busiest = np.argsort(-phases, axis=2)[:, :, :20]
    overlaps = [np.intersect1d(busiest[a, layer], busiest[b, layer]).size / 20
                for a, b in combinations(range(3), 2) for layer in range(6)]  # fmt: skip
    assert 0.25 <= np.mean(overlaps) <= 0.40


def hit_rate(chosen: np.ndarray, size: int) -> float:
    """Share of choices `[T, E]` that the `size` experts used last would have met."""
    last = np.full(chosen.shape[1], -1)
    hits = []
    for token, row in enumerate(chosen):
        recent = np.argsort(-last, kind="stable")[:size]
        hits.append(np.isin(np.flatnonzero(row), recent[last[recent] >= 0]).mean())
        last[row] = token
    return float(np.mean(hits[100:]))


def test_made_up_traffic_of_512_experts_has_no_hot_set_but_repeats_itself():
    mass, chosen = drawn(WORKLOADS["qwen3-next-80b"], tokens=1300, phases=2)
    assert chosen[0].any(0).mean() > 0.97
    phases = mass.sum(1)
    known = np.argsort(-phases[0], axis=1)[:, :32]
    assert 0.065 <= (np.take_along_axis(phases[1], known, 1).sum(1) / phases[1].sum(1)).mean() <= 0.12
    assert 0.62 <= np.mean([hit_rate(chosen[0][:500, layer], 64) for layer in range(3)]) <= 0.74
    assert 0.75 <= np.mean([hit_rate(chosen[0][:500, layer], 128) for layer in range(3)]) <= 0.86


def test_flat_traffic_is_flat():
    mass, _ = drawn(WORKLOADS["flat"], tokens=1000, phases=2)
    first, second = mass.sum(1)
    assert covered(first, second) == pytest.approx(0.2, abs=0.01)
