"""The scripts of the paper's figures, in toy size: what they count and time is what it is said to be."""

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from dynaexq.cli.demo_corpus import documents

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TOY = {"device": "cpu", "threads": 1}
WORKLOADS = ("prose", "code", "arithmetic")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "figures"))
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def texts(tmp_path):
    """Three files to read, which takes less time than reading the standard library."""
    sums = "".join(itertools.islice(documents("arithmetic"), 20))
    contents = ((BENCHMARKS.parent / "README.md").read_text(), Path(__file__).read_text(), sums)
    for name, content in zip(WORKLOADS, contents, strict=True):
        (tmp_path / name).write_text(content)
    return [f"{name}={tmp_path / name}" for name in WORKLOADS]


def written(out, name):
    """What a script wrote; its picture must be one, if it can be drawn here."""
    if find_spec("matplotlib") is not None:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{name}.json").read_text())


def test_activation_counts_the_choices_of_the_routers(tmp_path, texts):
    import fig1_activation
    import figure_helpers as figures

    fig1_activation.main(windows=2, length=32, text=texts, out=tmp_path, **TOY)
    results = written(tmp_path, "fig1_activation")
    model = figures.original(figures.EMBEDDED, "cpu")
    window = torch.stack(figures.workloads(figures.EMBEDDED, texts, 2, 32, "cpu")["code"])
    with torch.no_grad():
        logits = model(window, output_router_logits=True).router_logits
    for place, layer in enumerate(results["layers"]):
        chosen = logits[layer].topk(results["top_k"]).indices.flatten()
        counted = torch.bincount(chosen, minlength=32) / 64
        # Alone or beside another, a window gives logits that differ in their last bit: a choice may fall otherwise.
        assert np.abs(counted.numpy() - results["frequencies"]["code"][place]).sum() <= 2 * 2 / 64


def test_a_text_of_the_users_is_a_workload(tmp_path):
    import figure_helpers as figures

    (tmp_path / "letter.txt").write_text("Dear reader, this is a letter. " * 20)
    found = figures.workloads(figures.EMBEDDED, [f"letter={tmp_path / 'letter.txt'}"], 2, 16, "cpu")
    assert [len(window) for window in found["letter"]] == [16, 16]
    with pytest.raises(typer.BadParameter, match="NAME=FILE"):
        figures.workloads(figures.EMBEDDED, ["letter"], 2, 16, "cpu")
    with pytest.raises(typer.BadParameter, match="windows of 500 tokens, expected 2"):
        figures.workloads(figures.EMBEDDED, [f"letter={tmp_path / 'letter.txt'}"], 2, 500, "cpu")


def test_a_budget_from_the_configuration_is_what_the_model_takes():
    import figure_helpers as figures

    model = figures.patched(figures.EMBEDDED, "cpu", ("int2", "int4"), 0.25, quantizer="rtn")
    assert model.dynaexq.plan.num_slots == 32
    assert model.dynaexq.memory()["total"] == figures.budget(figures.EMBEDDED, ("int2", "int4"), 0.25)


def test_timeline_on_a_cpu_has_every_copy_inside_a_tick_inside_the_first_layer(tmp_path, texts):
    import fig3_timeline

    fig3_timeline.main(batch=2, prompt=64, steps=3, update_interval=1, text=texts, out=tmp_path, **TOY)
    results = written(tmp_path, "fig3_timeline")
    spans, promotions = results["spans"], [move for move in results["moves"] if move["promote"]]
    assert len(spans["forward"]) == len(spans["tick"]) == 3 * (1 + 3)
    assert len(spans["layer"]) == 4 * len(spans["forward"])
    assert promotions
    assert results["summary"]["copying_inside_ticks"] == pytest.approx(1)
    first_layers = [(begin, end) for name, begin, end in spans["layer"] if name == "0"]
    for move in promotions:
        assert move["decided"] <= move["copy_begin"] < move["copy_end"] <= move["published"]
        (tick,) = [(a, b) for _, a, b in spans["tick"] if a <= move["decided"] and move["published"] <= b]
        assert any(a <= tick[0] and tick[1] <= b for a, b in first_layers)


def test_timeline_as_perfetto_reads_it(tmp_path):
    import fig3_timeline

    spans = {"forward": [("prose", 0.0, 1.0)], "layer": [("0", 0.1, 0.9)], "tick": [("", 0.2, 0.8)]}
    up = {"name": "a", "promote": True, "decided": 0.3, "copy_begin": 0.4, "copy_end": 0.5, "published": 0.6}
    moves = [up, {"name": "b", "promote": False, "decided": 0.35, "published": 0.36}]
    for on_cpu, tracks in ((True, {0}), (False, {0, 1, 2})):
        events = fig3_timeline.chrome_trace(spans, moves, on_cpu)["traceEvents"]
        slices = [event for event in events if event["ph"] == "X"]
        assert {event["tid"] for event in slices} == tracks
        assert {event["cat"]: event["dur"] for event in slices}["copy"] == pytest.approx(1e5)
        ends = sorted((event["id"], event["ts"], event["ph"]) for event in events if event["ph"] in "be")
        assert [(number, phase) for number, _, phase in ends] == [(0, "b"), (0, "e"), (1, "b"), (1, "e")]
    summary = fig3_timeline.summary(spans, moves, slot_nbytes=10)
    assert summary["copying_inside_ticks"] == pytest.approx(1)
    assert summary["decided_to_published_microseconds"] == pytest.approx(3e5)
    assert (summary["promotions"], summary["demotions"], summary["bytes_copied"]) == (1, 1, 10)


def test_perplexity_is_measured_with_exactly_the_coldest_demoted(texts):
    import fig4_perplexity
    import figure_helpers as figures

    windows = figures.workloads(figures.EMBEDDED, texts, 1, 32, "cpu")["prose"]
    pair = fig4_perplexity.Pair(figures.EMBEDDED, "cpu", ("int2", "int4"), windows)
    hotness = pair.orders["hotness"]
    for order, share in (("hotness", 0.25), ("random", 0.75), ("hotness", 1.0), ("hotness", 0.5)):
        pair.demote(order, share)
        kept = pair.model.dynaexq.tiers() == 4
        assert kept.sum() == 128 * (1 - share)
        worth = pair.orders[order]
        assert worth[kept].min(initial=np.inf) >= worth[~kept].max()
    assert hotness[kept].sum() > 0.8 * hotness.sum()


def test_perplexity_rises_with_the_share_demoted(tmp_path, texts):
    import fig4_perplexity

    fig4_perplexity.main(pair=["int2,int4"], shares="0,0.5,1", windows=2, length=64, text=texts, out=tmp_path, **TOY)
    (pair,) = written(tmp_path, "fig4_perplexity")["pairs"]
    for order in fig4_perplexity.ORDERS:
        rows = [row for row in pair["rows"] if row["order"] == order]
        assert [row["low"] for row in rows] == [0, 0.5, 1]
        assert rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"]
        assert rows[0]["bytes"] > rows[1]["bytes"] > rows[2]["bytes"]
    half = {row["order"]: row["kl"] for row in pair["rows"] if row["low"] == 0.5}
    assert half["hotness"] < half["random"]


def test_latency_of_three_contestants(tmp_path, texts):
    import fig5_latency

    fig5_latency.main(batches="1,2", prompt=16, steps=3, rounds=2, text=texts, out=tmp_path, **TOY)
    results = written(tmp_path, "fig5_latency")
    seen = [(row["batch"], row["contestant"]) for row in results["rows"]]
    assert seen == [(batch, name) for batch in (1, 2) for name in ("16-bit", "static", "dynamic")]
    assert results["promotions"]["static"] == 26  # those of the start
    assert len(results["implementations"]) == 4


def test_latency_figures_are_those_of_the_requests():
    import fig5_latency
    from latency import Contestant, Request

    def contestant(*requests):
        return Contestant(None, requests={4: [Request(prompt, [step] * 100) for prompt, step in requests]})

    # The machine slows down threefold in the second round, for both alike.
    contestants = {"16-bit": contestant((1.0, 0.02), (3.0, 0.06)), "static": contestant((0.5, 0.01), (1.5, 0.03))}
    baseline, static = fig5_latency.rows_of(contestants, [4])
    assert baseline["times_16-bit"] == 1
    assert static["times_16-bit"] == pytest.approx(2)
    assert static["quartiles"] == "2.00 to 2.00"
    assert baseline["tokens_per_second"] == pytest.approx((400 / 3 + 400 / 9) / 2)
    assert (baseline["ttft_ms"], baseline["tpot_ms"]) == (pytest.approx(2000), pytest.approx(40))
    assert static["p99_ms"] == pytest.approx(30)


def test_the_own_task_asks_for_right_results(tmp_path):
    import table1_accuracy

    table1_accuracy.write_own_task(tmp_path, 50)
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == 50
    for question in questions:
        numbers = [int("".join(c for c in choice if c.isdigit())) for choice in question["choices"]]
        assert len(set(numbers)) == 4
        term = re.search(r"([\d+*/() -]+) =$", question["question"])[1]
        assert eval(term.strip()) == numbers[question["answer"]], question


def test_the_share_recovered():
    import table1_accuracy

    figures = {"high": 0.9, "low": 0.5, "static": 0.6, "dynamic": 0.8}
    rows = [{"contestant": name, "bytes": 1, "t: acc": v, "t: acc_stderr": 0.1} for name, v in figures.items()]
    shares = {row["contestant"]: row["recovered"] for row in table1_accuracy.recovered(rows)}
    assert shares == {"static": pytest.approx(0.25), "dynamic": pytest.approx(0.75)}
    assert table1_accuracy.recovered(rows[1:]) == []


def test_accuracy_says_what_it_needs(tmp_path, monkeypatch, capsys):
    import table1_accuracy

    monkeypatch.setattr(table1_accuracy, "find_spec", lambda name: None)
    with pytest.raises(typer.Exit):
        table1_accuracy.main(out=tmp_path, **TOY)
    assert "dynaexq[benchmarks]" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # the harness is not ours to keep clean
def test_accuracy_by_the_harness(tmp_path):
    pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "dynaexq[benchmarks]"')
    import table1_accuracy

    table1_accuracy.main(contestants="16-bit,low,high,dynamic", questions=40, out=tmp_path, **TOY)
    results = written(tmp_path, "table1_accuracy")
    accuracy = {row["contestant"]: row["dynaexq_arithmetic: acc"] for row in results["rows"]}
    assert accuracy["16-bit"] > 0.6, "four choices: chance is 0.25"
    assert accuracy["high"] == pytest.approx(accuracy["16-bit"], abs=0.1)
