"""A snapshot as metrics of Prometheus. Names end in their units; what only grows is a counter."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

HEALTH = ("ok", "degraded", "standing still")

COUNTERS = {
    "steps": "forward passes",
    "tokens": "tokens that were routed",
    "promotions": "experts that were upgraded",
    "demotions": "experts that gave their upgrade up",
    "bytes_copied": "bytes copied for upgrades",
    "failed": "copies that failed",
}
GAUGES = {
    "upgraded": "experts with an upgrade",
    "slots": "upgrades that there is room for",
    "experts": "experts of all layers",
    "in_flight": "copies on their way",
    "host_bytes": "bytes of upgrades that wait on the host",
}


class SnapshotCollector:
    """What Prometheus asks for its metrics.

    Args:
        snapshot: makes one; None while there is no model.
    """

    def __init__(self, snapshot: Callable[[], dict[str, Any] | None]):
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        snapshot = self._snapshot()
        if snapshot is None:
            return
        stats = snapshot["stats"]
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f"dynaexq_{name}", meaning, value=stats[name])
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f"dynaexq_{name}", meaning, value=stats[name])
        memory = GaugeMetricFamily("dynaexq_memory_bytes", "bytes on the device, by purpose", labels=["part"])
        for part, nbytes in snapshot["memory"].items():
            memory.add_metric([part], nbytes)
        yield memory
        yield GaugeMetricFamily(
            "dynaexq_coverage_ratio", "share of the routing that met an upgrade", value=stats["hot_coverage"]
        )
        state = GaugeMetricFamily("dynaexq_health", "1 for the state of precision management", labels=["state"])
        for name in HEALTH:
            state.add_metric([name], float(snapshot["health"]["state"] == name))
        yield state


def exposition(snapshot: Callable[[], dict[str, Any] | None]) -> bytes:
    """The metrics in the text format of Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(snapshot))
    return generate_latest(registry)
