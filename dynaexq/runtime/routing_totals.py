"""What was routed so far, in totals."""

from collections.abc import Sequence
from dataclasses import dataclass

from dynaexq.policy.controller import Window


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
