"""A snapshot reads well in a terminal of any width and as HTML, and says what is in it."""

import io
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import patching
import pytest
import tiny
import torch
from rich.console import Console
from rich.table import Table

from dynaexq.views.html import STYLE, fragment
from dynaexq.views.tables import print_table
from dynaexq.views.terminal import SnapshotView
from dynaexq.views.words import relative_hotness, squeezed_rows, upgraded


@pytest.fixture(scope="module")
def snapshot() -> dict[str, Any]:
    """Of a model that has moved."""
    model = tiny.tiny_qwen3_moe(torch.float32)
    runtime = patching.patch(
        model, "1GiB", tiers=("int4", "int8"), update_interval=1, auto_pause=False, half_life=4, hysteresis=0.0
    )
    memory = runtime.memory()
    runtime.set_budget(memory["total"] - memory["upgrade"] * 3 // 4)
    for routes in ([[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]):
        tiny.steer(model, routes)
        for _ in range(4):
            tiny.logits(model)
    found = runtime.snapshot()
    runtime.close()
    return found


def printed(snapshot: dict[str, Any], width: int, **options: Any) -> str:
    console = Console(width=width, force_jupyter=False, **options)
    with console.capture() as capture:
        console.print(SnapshotView(snapshot))
    return capture.get()


def test_a_snapshot_is_plain_data(snapshot: dict[str, Any]) -> None:
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert len(snapshot["bits"]) == len(snapshot["hotness"]) == len(snapshot["layers"]) == 2
    assert snapshot["moves"], "else this shows nothing"
    assert snapshot["coverage"][-1]["tokens"] <= snapshot["stats"]["tokens"]


@pytest.mark.parametrize("width", [40, 72, 80, 120, 200])
def test_nothing_is_cut_off_at_any_width(snapshot: dict[str, Any], width: int) -> None:
    text = printed(snapshot, width, color_system=None)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    squeezed = "".join(text.split())
    for fact in (snapshot["model"], "expertsat8bits", "coverageovertime", "latestmoves", "health:ok"):
        assert fact in squeezed, fact
    assert f"{snapshot['stats']['promotions']:,}" in text


def test_colors_are_left_out_where_they_are_not_wanted(
    snapshot: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b[36m" in printed(snapshot, 80, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in printed(snapshot, 80, force_terminal=True, color_system="standard")


def test_html_is_well_formed_and_runs_nothing(snapshot: dict[str, Any]) -> None:
    html = fragment({**snapshot, "model": "<script>alert(1)</script>", "layers": ["<b>", "&"]})
    body = ElementTree.fromstring(html.removeprefix(STYLE))
    assert body.attrib == {"class": "dynaexq"}
    assert [child.tag for child in body.iter() if child.tag == "script"] == []
    assert len(list(body.iter("svg"))) == 3
    assert "\x1b" not in html


def test_maps_have_a_cell_for_every_expert(snapshot: dict[str, Any]) -> None:
    assert sum(map(sum, upgraded(snapshot))) == snapshot["stats"]["upgraded"]
    assert [max(row) for row in relative_hotness(snapshot)] == [1.0, 1.0]
    rows = [[float(i == j) for j in range(128)] for i in range(48)]
    squeezed = squeezed_rows(rows, 16, 70)
    assert (len(squeezed), {len(row) for row in squeezed}) == (16, {70})
    assert all(0 <= value <= 1 for row in squeezed for value in row)


def test_what_stands_still_is_seen_at_once(snapshot: dict[str, Any]) -> None:
    bad = {**snapshot, "health": {**snapshot["health"], "state": "standing still", "words": "standing still: why"}}
    assert '<p class="bad">health: standing still: why' in fragment(bad)
    assert "\x1b[1;31m" in printed(bad, 80, force_terminal=True, color_system="standard")


def test_a_model_that_saw_nothing_yet_has_a_view() -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    with patching.patch(model, "1GiB", tiers=("int4",)) as runtime:
        found = runtime.snapshot()
    assert "coverage" not in printed(found, 80).split("\n")[-2]
    ElementTree.fromstring(fragment(found).removeprefix(STYLE))


@pytest.mark.parametrize("width", [10, 40, 200])
def test_a_table_is_as_wide_as_its_figures_and_the_console_as_before(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    table = Table("bytes", "promotions", "KL, mean (nats per token)", title="four copies of one model")
    table.add_row("4,816,704", "1,234,567", "0.0795")
    print_table(console, table)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert all(figure in shown for figure in ("4,816,704", "1,234,567", "0.0795", "KL, mean (nats per token)"))
    assert console.width == width
