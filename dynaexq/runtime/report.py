"""What happened so far, as totals and as something to read. It watches and never steers."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType

from dynaexq.policy.controller import Window
from dynaexq.views.html import fragment
from dynaexq.views.terminal import SnapshotView

NARROWEST, WIDEST = 40, 120
"""Characters of a report as text, whatever the terminal's width."""


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


class Report:
    """A snapshot for people: prints as text, and shows itself in a notebook.

    Args:
        snapshot: as `Runtime.snapshot` makes it.
    """

    def __init__(self, snapshot: dict[str, Any]):
        self.snapshot = snapshot

    def __rich__(self) -> RenderableType:
        return SnapshotView(self.snapshot)

    def __str__(self) -> str:
        width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
        console = Console(width=width, force_terminal=False, force_jupyter=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return fragment(self.snapshot)
