"""Pictures of what a runtime shows and benchmarks measure, by matplotlib. They measure nothing themselves.

Each function returns a figure, which a notebook shows and `figure.savefig(path)` writes. Colors remain apart for
color-blind readers, and markers and shades do without color.

Examples:
    >>> from dynaexq import plots
    >>> plots.hotness_map(model.dynaexq.snapshot())  # doctest: +SKIP
"""

from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Paul Tol's "bright"."""

MARKERS = ("o", "s", "D", "^", "v", "<", "*")


def precision_map(snapshot: Mapping[str, Any]) -> "Figure":
    """Bits of every expert, a row for each layer; `snapshot` as `Runtime.snapshot` makes it."""
    return _map(snapshot["bits"], "bits per weight", f"{snapshot['model']}: precision")


def hotness_map(snapshot: Mapping[str, Any]) -> "Figure":
    """Routing mass per token that every expert has got of late, a row for each layer."""
    return _map(snapshot["hotness"], "routing mass per token", f"{snapshot['model']}: hotness")


def coverage(snapshot: Mapping[str, Any]) -> "Figure":
    """Share of the routing that met an upgraded expert, by tokens seen, and the moves between."""
    moments = snapshot["coverage"]
    tokens = [moment["tokens"] for moment in moments]
    figure, axes = _figure((7.0, 3.5))
    axes.plot(tokens, [100 * moment["coverage"] for moment in moments], color=COLORS[0], label="coverage")
    axes.set(xlabel="tokens", ylabel="% of the routing mass", ylim=(0, 100))
    beside = axes.twinx()
    beside.bar(tokens, [moment["promotions"] for moment in moments], _gap(tokens), color=COLORS[6], alpha=0.4)
    beside.set_ylabel("promotions")
    axes.set_title(f"{snapshot['model']}: coverage over time")
    return figure


def activation(mass: Mapping[str, Sequence[float]], title: str = "activation by workload") -> "Figure":
    """Share of the routing of each expert of one layer, hottest first, a line for each workload.

    Args:
        mass: workload -> routing mass `[E]`, in any unit.
    """
    figure, axes = _figure((7.0, 4.0))
    for (name, values), color, marker in zip(mass.items(), COLORS, MARKERS, strict=False):
        shares = np.sort(np.asarray(values, dtype=float))[::-1]
        axes.plot(100 * shares / max(shares.sum(), 1e-30), marker=marker, ms=3, color=color, label=name)
    axes.set(xlabel="expert, hottest first", ylabel="% of the routing mass", ylim=(0, None), title=title)
    axes.legend(frameon=False)
    return figure


def kl_by_bits(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """KL from 16 bit against bits per weight; what is calibrated is filled.

    Args:
        rows: `who`, `bits per weight`, `KL` and `calibrated`, as `benchmarks/quality/peers.py` writes them.
    """
    figure, axes = _figure((7.0, 4.5))
    for who, color, marker in zip(dict.fromkeys(row["who"] for row in rows), COLORS, MARKERS, strict=False):
        for filled in (False, True):
            points = [
                (row["bits per weight"], row["KL"])
                for row in rows
                if row["who"] == who and bool(row["calibrated"]) == filled
            ]
            if points:
                label = who + (", calibrated" if filled else "")
                fill: Any = "full" if filled else "none"
                axes.plot(*zip(*points, strict=True), marker, color=color, fillstyle=fill, label=label)
    axes.set(yscale="log", xlabel="bits per weight of the experts", ylabel="KL from 16 bit (nats per token)")
    axes.legend(fontsize=8, frameon=False)
    return figure


def by_batch(rows: Sequence[Mapping[str, Any]], figure_of: str, unit: str) -> "Figure":
    """One figure of every contestant by batch size.

    Args:
        rows: `contestant`, `batch` and the figure, as `benchmarks/figures/fig5_latency.py` writes them.
        figure_of: its name in the rows.
        unit: what stands on the axis.
    """
    figure, axes = _figure((7.0, 4.0))
    for who, color, marker in zip(dict.fromkeys(row["contestant"] for row in rows), COLORS, MARKERS, strict=False):
        points = [(row["batch"], row[figure_of]) for row in rows if row["contestant"] == who]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=who)
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch size", ylabel=unit, ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def _map(rows: Sequence[Sequence[float]], unit: str, title: str) -> "Figure":
    """A cell for each value, darker for more: it reads in gray as well."""
    values = np.asarray(rows, dtype=float)
    figure, axes = _figure((8.0, max(2.0, min(8.0, 1.2 + 0.12 * len(values)))))
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0.0, interpolation="nearest")
    figure.colorbar(image, label=unit)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    return figure


def _gap(tokens: Sequence[int]) -> float:
    """Width of a bar for each of `tokens`."""
    return float(np.median(np.diff(tokens))) if len(tokens) > 1 else 1.0


def _figure(size: tuple[float, float]) -> "tuple[Figure, Axes]":
    figure = _figure_class()(figsize=size, layout="constrained")
    return figure, figure.subplots()


@cache
def _figure_class() -> "type[Figure]":
    """Matplotlib's figure, which a notebook shows also where pyplot was never imported."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "dynaexq[plots]"') from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            written = BytesIO()
            self.savefig(written, format="png")
            return written.getvalue()

    return Picture
