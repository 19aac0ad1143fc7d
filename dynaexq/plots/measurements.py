"""Pictures of what benchmarks measure, from the rows that they write. They measure nothing themselves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaexq.plots.style import COLORS, looks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOVES_DRAWN = 24
"""Moves of a timeline that are drawn one by one."""

_TIMELINE = dict(zip(("forward", "copy", "published", "tick", "layer"), COLORS, strict=False))

Span = tuple[str, float, float]
"""What it is called, and the seconds at which it begins and ends."""


def activation(mass: Mapping[str, Sequence[float]], title: str = "activation by workload") -> "Figure":
    """Share of the routing of each expert of one layer, hottest first, a line for each workload.

    Args:
        mass: workload -> routing mass `[E]`, in any unit.
    """
    figure = new_figure((7.0, 4.0))
    axes = figure.subplots()
    for name, color, marker in looks(mass):
        shares = np.sort(np.asarray(mass[name], dtype=float))[::-1]
        axes.plot(100 * shares / max(shares.sum(), 1e-30), marker=marker, ms=3, color=color, label=name)
    axes.set(xlabel="expert, hottest first", ylabel="% of the routing mass", ylim=(0, None), title=title)
    axes.legend(frameon=False)
    return figure


def kl_by_bits(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """KL from 16 bit against bits per weight; what is calibrated is filled.

    Args:
        rows: `who`, `bits per weight`, `KL` and `calibrated`, as `benchmarks/quality/peers.py` writes them.
    """
    figure = new_figure((7.0, 4.5))
    axes = figure.subplots()
    for who, color, marker in looks(row["who"] for row in rows):
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


def choices(frequencies: Mapping[str, Sequence[Sequence[float]]], layers: Sequence[int], top_k: int) -> "Figure":
    """How often each expert is chosen: a row for each workload, a column for each layer, experts by their number.

    Args:
        frequencies: workload -> share of the tokens that chose each expert, `[layers][experts]`.
        layers: numbers of these layers.
        top_k: choices per token; a dashed line shows where all experts would be if they were alike.
    """
    figure = new_figure((5.0 * len(layers), 1.7 * len(frequencies) + 0.8))
    grid = figure.subplots(len(frequencies), len(layers), sharex=True, sharey="col", squeeze=False)
    for row, (name, color, _) in zip(grid, looks(frequencies), strict=True):
        for axes, frequency in zip(row, frequencies[name], strict=True):
            axes.bar(range(len(frequency)), [100 * share for share in frequency], width=0.9, color=color)
            axes.axhline(100 * top_k / len(frequency), color="black", lw=0.8, ls="--")
        row[0].set_ylabel(f"{name}\n% of tokens")
    for above, below, layer in zip(grid[0], grid[-1], layers, strict=True):
        above.set_title(f"layer {layer}")
        below.set_xlabel("expert")
    return figure


def by_batch(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, str]) -> "Figure":
    """Figures of every contestant by batch size, a panel for each.

    Args:
        rows: `contestant`, `batch` and the figures, as `benchmarks/figures/fig5_latency.py` writes them.
        panels: name of a figure in the rows -> its unit.
    """
    figure = new_figure((3.4 * len(panels) + 1, 3.6))
    batches = sorted({row["batch"] for row in rows})
    for axes, (name, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for who, color, marker in looks(row["contestant"] for row in rows):
            points = [(row["batch"], row[name]) for row in rows if row["contestant"] == who]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, ms=4, label=who)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set(xlabel="batch size", ylabel=unit, ylim=(0, None))
    figure.axes[0].legend(frameon=False)
    return figure


def quality_by_share(pairs: Sequence[Mapping[str, Any]], perplexity: float) -> "Figure":
    """Perplexity above and KL below against the share of experts at the low precision, a column for each pair.

    Args:
        pairs: `tiers` and `rows` of `order`, `low`, `perplexity` and `kl`, as `benchmarks/figures/fig4_perplexity.py`
            writes them.
        perplexity: of the unpatched model.
    """
    figure = new_figure((4.5 * len(pairs), 6.0))
    grid = figure.subplots(2, len(pairs), sharex=True, squeeze=False)
    for (above, below), pair in zip(grid.T, pairs, strict=True):
        base, upgrade = pair["tiers"]
        for axes, name in ((above, "perplexity"), (below, "kl")):
            for order, color, marker in looks(row["order"] for row in pair["rows"]):
                points = [(100 * row["low"], row[name]) for row in pair["rows"] if row["order"] == order]
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=order, ms=4)
        above.axhline(perplexity, color="black", lw=0.8, ls="--")
        above.set_title(f"{upgrade} to {base}")
        below.set_xlabel("% of the experts demoted")
    grid[0, 0].set_ylabel("perplexity (dashed: unpatched)")
    grid[1, 0].set_ylabel("KL divergence, nats per token")
    grid[0, 0].legend(frameon=False, title="demoted by least")
    return figure


def accuracy(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> "Figure":
    """A panel for each metric, a bar with its standard error for each contestant.

    Args:
        rows: `contestant`, the metrics and `METRIC_stderr`, as `benchmarks/figures/table1_accuracy.py` writes them.
    """
    figure = new_figure((len(metrics) * (1 + 0.7 * len(rows)), 3.6))
    names = [row["contestant"] for row in rows]
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        errors = [row.get(f"{metric}_stderr", 0.0) for row in rows]
        bars = axes.bar(names, [row[metric] for row in rows], yerr=errors, color=COLORS[0])
        axes.bar_label(bars, fmt="%.3g")
        axes.set(xlabel="contestant", ylabel=metric)
        axes.tick_params(axis="x", rotation=30)
    return figure


def timeline(spans: Mapping[str, Sequence[Span]], moves: Sequence[Mapping[str, Any]]) -> "Figure":
    """The swap pipeline against compute: above the whole run, below the tick with the most promotions.

    Args:
        spans: of `forward`, `layer` and `tick`.
        moves: `name`, `promote`, and seconds at which each was `decided`, copied (`copy_begin`, `copy_end`) and
            `published`, as `benchmarks/figures/fig3_timeline.py` writes them.
    """
    figure = new_figure((10.0, 7.0))
    whole, close = figure.subplots(2, 1, height_ratios=(1, 2))
    copies = [(move["name"], move["copy_begin"], move["copy_end"]) for move in moves if move["promote"]]
    everything = {**spans, "copy": copies}
    _bars(whole, everything, ("forward", "tick", "copy"))
    whole.set(title="the whole run", xlabel="milliseconds")
    begin, end = _busiest(spans, moves)
    _bars(close, everything, ("forward", "layer", "tick", "copy"))
    shown = [move for move in moves if move["published"] >= begin and move["decided"] <= end]
    _draw_moves(close, shown[:MOVES_DRAWN])
    close.set_xlim(begin * 1e3, end * 1e3)
    close.set_title("around the tick with the most promotions; moves: | decided, red copying, ▲ published, ▼ demoted")
    close.set_xlabel("milliseconds")
    return figure


def _busiest(spans: Mapping[str, Sequence[Span]], moves: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds from where to where the picture looks closely."""
    promotions = [move for move in moves if move["promote"]]

    def started(tick: Span) -> int:
        return sum(tick[1] <= move["decided"] <= tick[2] for move in promotions)

    _, begin, end = max(spans["tick"], key=started)
    published = [move["published"] for move in promotions if begin <= move["decided"] <= end]
    end = max([end, *published])
    margin = max(end - begin, 1e-4)
    return begin - 0.5 * margin, end + 0.5 * margin


def _draw_moves(axes: "Axes", moves: Sequence[Mapping[str, Any]]) -> None:
    """A line for each move, below the bars."""
    for row, move in enumerate(moves):
        height = -0.8 - row * 0.25
        decided, published = move["decided"] * 1e3, move["published"] * 1e3
        axes.plot([decided, published], [height] * 2, color="#999999", lw=1)
        if move["promote"]:
            copied = [move["copy_begin"] * 1e3, move["copy_end"] * 1e3]
            axes.plot(copied, [height] * 2, color=_TIMELINE["copy"], lw=3)
        axes.plot(decided, height, "|", color="black", ms=6)
        axes.plot(published, height, "^" if move["promote"] else "v", color=_TIMELINE["published"], ms=4)


def _bars(axes: "Axes", spans: Mapping[str, Sequence[Span]], rows: tuple[str, ...]) -> None:
    for row, kind in enumerate(reversed(rows)):
        bars = [(begin * 1e3, (end - begin) * 1e3) for _, begin, end in spans[kind]]
        # What follows at once needs a gap to be told apart; a copy is so short that its edge is what is seen.
        edge = "white" if kind in ("forward", "layer") else _TIMELINE[kind]
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=_TIMELINE[kind], edgecolors=edge, linewidth=0.4)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
