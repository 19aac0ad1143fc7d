"""Pictures show what they are given, and can be read without color."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynaexq import plots

pytest.importorskip("matplotlib")

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SNAPSHOT: dict[str, Any] = {
    "model": "Model",
    "bits": [[2, 4, 2, 2], [4, 2, 2, 2]],
    "hotness": [[0.1, 0.7, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1]],
    "coverage": [{"tokens": 10 * i, "coverage": i / 10, "promotions": i % 3} for i in range(1, 9)],
}


def drawn() -> dict[str, Any]:
    names = ("fig1_activation", "fig3_timeline", "fig4_perplexity")
    figure1, figure3, figure4 = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    return {
        "precision": plots.precision_map(SNAPSHOT),
        "hotness": plots.hotness_map(SNAPSHOT),
        "coverage": plots.coverage(SNAPSHOT),
        "activation": plots.activation({"code": [1, 5, 2], "prose": [3, 3, 1]}),
        "peers": plots.kl_by_bits(json.loads((RESULTS / "peers.json").read_text())["rows"]),
        "over time": plots.precision_over_time([SNAPSHOT, {**SNAPSHOT, "bits": SNAPSHOT["bits"][::-1]}]),
        "latency": plots.by_batch(
            [{"contestant": who, "batch": b, "ms": b * k} for k, who in enumerate("ab", 1) for b in (1, 2, 4)],
            {"ms": "milliseconds"},
        ),
        "choices": plots.choices(figure1["frequencies"], figure1["layers"], figure1["top_k"]),
        "timeline": plots.timeline(figure3["spans"], figure3["moves"]),
        "by share": plots.quality_by_share(figure4["pairs"], figure4["perplexity"]),
        "accuracy": plots.accuracy(
            [{"contestant": "static", "task: acc": 0.8, "task: acc_stderr": 0.01}], ["task: acc"]
        ),
    }


@pytest.mark.parametrize("name", drawn())
def test_a_picture_has_its_units_and_can_be_written(name: str, tmp_path: Path) -> None:
    figure = drawn()[name]
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert name == "timeline" or any(axes.get_ylabel() for axes in figure.axes), "its rows have names instead"
    assert figure._repr_png_().startswith(b"\x89PNG"), "as a notebook shows it"
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_maps_and_lines_have_the_values() -> None:
    image = plots.hotness_map(SNAPSHOT).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), SNAPSHOT["hotness"])
    line = plots.coverage(SNAPSHOT).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [10 * i for i in range(1, 9)])
    lines = plots.activation({"code": [1, 5, 2]}).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [62.5, 25, 12.5])


def test_contestants_differ_in_more_than_color() -> None:
    lines = drawn()["peers"].axes[0].lines
    looks = {(line.get_marker(), line.get_fillstyle()) for line in lines}
    assert len(looks) == len(lines)


def test_a_snapshot_without_traffic_has_pictures() -> None:
    plots.coverage({**SNAPSHOT, "coverage": []})
    plots.coverage({**SNAPSHOT, "coverage": SNAPSHOT["coverage"][:1]})


def test_precision_over_time_has_a_column_for_each_snapshot() -> None:
    figure = plots.precision_over_time([SNAPSHOT, {**SNAPSHOT, "bits": SNAPSHOT["bits"][::-1]}], layer=1)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[4, 2], [2, 4], [2, 2], [2, 2]])


def test_a_panel_for_each_figure_and_a_line_for_each_contestant() -> None:
    rows = json.loads((RESULTS / "fig5_latency.json").read_text())["rows"]
    figure = plots.by_batch(rows, {"tpot_ms": "ms", "tokens_per_second": "tokens per second"})
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["16-bit", "static", "dynamic"]
