"""Pictures of what a runtime shows: `Runtime.snapshot`, one or several."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaexq.plots.style import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def precision_map(snapshot: Mapping[str, Any]) -> "Figure":
    """Bits of every expert, a row for each layer; `snapshot` as `Runtime.snapshot` makes it."""
    return _bits(snapshot["bits"], f"{snapshot['model']}: precision")


def hotness_map(snapshot: Mapping[str, Any]) -> "Figure":
    """Routing mass per token that every expert has got of late, a row for each layer."""
    return _map(snapshot["hotness"], "routing mass per token", f"{snapshot['model']}: hotness")


def coverage(snapshot: Mapping[str, Any]) -> "Figure":
    """Share of the routing that met an upgraded expert, by tokens seen, and the moves between."""
    moments = snapshot["coverage"]
    tokens = [moment["tokens"] for moment in moments]
    figure = new_figure((7.0, 3.5))
    axes = figure.subplots()
    axes.plot(tokens, [100 * moment["coverage"] for moment in moments], color=COLORS[0], label="coverage")
    axes.set(xlabel="tokens", ylabel="% of the routing mass", ylim=(0, 100))
    beside = axes.twinx()
    beside.bar(tokens, [moment["promotions"] for moment in moments], _gap(tokens), color=COLORS[6], alpha=0.4)
    beside.set_ylabel("promotions")
    axes.set_title(f"{snapshot['model']}: coverage over time")
    return figure


def precision_over_time(snapshots: Sequence[Mapping[str, Any]], layer: int = 0) -> "Figure":
    """Bits of every expert of one layer, a column for each of `snapshots` in the order they were taken."""
    columns = np.array([snapshot["bits"][layer] for snapshot in snapshots]).T
    figure = _bits(columns, f"{snapshots[0]['model']}: precision in layer {layer}")
    figure.axes[0].set(xlabel="snapshot", ylabel="expert")
    return figure


def _bits(rows: Any, title: str) -> "Figure":
    return _map(rows, "bits per weight", title, np.unique(rows))


def _map(rows: Any, unit: str, title: str, ticks: np.ndarray | None = None) -> "Figure":
    """A cell for each value, darker for more: it reads in gray as well."""
    values = np.asarray(rows, dtype=float)
    figure = new_figure((8.0, max(2.0, min(8.0, 1.2 + 0.12 * len(values)))))
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0.0, interpolation="nearest")
    figure.colorbar(image, label=unit, ticks=ticks)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    return figure


def _gap(tokens: Sequence[int]) -> float:
    """Width of a bar for each of `tokens`."""
    return float(np.median(np.diff(tokens))) if len(tokens) > 1 else 1.0
