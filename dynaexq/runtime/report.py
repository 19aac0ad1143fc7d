"""What happened so far, as numbers and as a table to read. It watches and never steers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table

from dynaexq.policy.controller import Window

WIDTH = 72  # characters of the table


@dataclass
class RoutingTotals:
    """Routing since the start: tokens of the first layer, mass of all layers, and its part on upgraded experts."""

    tokens: int = 0
    routed_mass: float = 0.0
    hot_mass: float = 0.0

    def add(self, window: Window) -> None:
        """Count one window."""
        self.tokens += int(window.tokens[0])
        self.routed_mass += float(window.mass.sum())
        self.hot_mass += float(window.mass[window.upgraded].sum())

    @classmethod
    def merged(cls, totals: Sequence["RoutingTotals"]) -> "RoutingTotals":
        """The totals of several devices, each of which sees every token."""
        return cls(
            max(total.tokens for total in totals),
            sum(total.routed_mass for total in totals),
            sum(total.hot_mass for total in totals),
        )

    @property
    def hot_coverage(self) -> float:
        """Share of the routing mass that met an upgraded expert; 0 before any traffic."""
        return self.hot_mass / self.routed_mass if self.routed_mass else 0.0


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1%}" if name == "hot_coverage" else f"{value:,}"


class Report:
    """A snapshot for people: prints as a table, and shows itself in a notebook."""

    def __init__(
        self,
        memory: dict[str, int],
        stats: dict[str, Any],
        tiers: np.ndarray,
        names: tuple[str, ...],
        verdict: str,
        health: str,
    ):
        self.memory, self.stats, self.tiers, self.names = memory, stats, tiers, names
        self.verdict, self.health = verdict, health

    def __rich__(self) -> RenderableType:
        table = Table(
            title=f"dynaexq: {' + '.join(self.names)}",
            show_header=False,
            caption=f"{self.verdict}\nhealth: {self.health}",
            caption_justify="left",
        )
        table.add_column(style="bold")
        table.add_column(justify="right")
        for part, nbytes in self.memory.items():
            table.add_row(f"{part} bytes", f"{nbytes:,}")
        table.add_section()
        for bits, count in zip(*np.unique(self.tiers, return_counts=True), strict=True):
            table.add_row(f"experts at {bits} bits", f"{count:,}")
        table.add_section()
        for name, value in self.stats.items():
            table.add_row(name.replace("_", " "), _shown(name, value))
        return table

    def __str__(self) -> str:
        console = Console(width=WIDTH, force_terminal=False, force_jupyter=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        # Else rich, in a notebook, would show what it is to record.
        console = Console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
