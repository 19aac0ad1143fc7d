"""A snapshot in a terminal of any width: figures, maps of layers by experts, coverage, moves; colors add nothing."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dynaexq.views.words import figures, moves_in_words, relative_hotness, squeezed, squeezed_rows, upgraded

SHADES = " ░▒▓█"
BARS = " ▁▂▃▄▅▆▇█"
MOST_ROWS, MOST_MOVES, NARROW = 16, 6, 72


class SnapshotView:
    """What rich prints of a snapshot.

    Args:
        snapshot: as `Runtime.snapshot` makes it.
        moves: whether to tell the latest moves as well.
    """

    def __init__(self, snapshot: dict[str, Any], moves: bool = True):
        self._snapshot, self._moves = snapshot, moves

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, snapshot = options.max_width, self._snapshot
        health, verdict = snapshot["health"], snapshot["verdict"]
        yield Text(f"dynaexq: {snapshot['model']}, {' + '.join(snapshot['tiers'])}", style="bold")
        yield Text(f"health: {health['words']}", style="" if health["state"] == "ok" else "bold red")
        yield Text(verdict["words"])
        yield Text()
        yield _figures(snapshot, width)
        yield from _maps(snapshot, width)
        yield from _coverage(snapshot, width)
        if self._moves and snapshot["moves"]:
            yield _latest(snapshot)


def _figures(snapshot: dict[str, Any], width: int) -> RenderableType:
    tables = []
    for title, rows in figures(snapshot):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 0))
        table.add_column(overflow="fold")
        table.add_column(justify="right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    if width < NARROW:
        return Group(*tables)
    beside = Table.grid(padding=(0, 3))
    beside.add_row(Group(*tables[:2]), tables[2])
    return beside


def _maps(snapshot: dict[str, Any], width: int) -> Iterator[RenderableType]:
    """Precision and hotness of every expert: a row for each layer, or for several."""
    for title, rows, color in (
        ("precision: upgraded experts", upgraded(snapshot), "cyan"),
        ("hotness: beside each layer's hottest expert", relative_hotness(snapshot), "red"),
    ):
        yield Text(f"{title} ({len(rows)} layers x {len(rows[0])} experts)", style="italic")
        for row in squeezed_rows(rows, MOST_ROWS, width - 2):
            yield Text("│" + "".join(_shade(value, SHADES) for value in row) + "│", style=color)


def _coverage(snapshot: dict[str, Any], width: int) -> Iterator[RenderableType]:
    moments = snapshot["coverage"]
    if moments:
        values = squeezed([moment["coverage"] for moment in moments], width - 8)
        yield Text("coverage over time", style="italic")
        yield Text("".join(_shade(value, BARS) for value in values) + f" {values[-1]:.0%}", style="green")


def _latest(snapshot: dict[str, Any]) -> RenderableType:
    table = Table(title="latest moves", title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for row in moves_in_words(snapshot, MOST_MOVES):
        table.add_row(*row)
    return table


def _shade(value: float, shades: str) -> str:
    return shades[min(len(shades) - 1, max(0, -int(-value * (len(shades) - 1) // 1)))]
