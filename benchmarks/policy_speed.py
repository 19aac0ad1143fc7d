"""Time of one decision (hotness, watch, rule and moves) at the shapes of real models, on one core.

python benchmarks/policy_speed.py [--json FILE]
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dynaexq.policy.controller import ControlLoop
from dynaexq.policy.hotness import HotnessTracker
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.settings import Settings

SHAPES = {"Qwen3-30B-A3B": ((48, 128), 8), "Qwen3-Next-80B-A3B": ((48, 512), 10)}
REPEATS = 200
TOKENS = 8
"""Tokens between two decisions."""


class SteepCounts:
    """Counts of steep, ever-changing traffic, drawn before the clock starts."""

    def __init__(self, shape: tuple[int, int], top_k: int):
        self.shape, self.top_k = shape, top_k
        self._rng = np.random.default_rng(0)
        self.draw()

    def draw(self) -> None:
        steep = self._rng.exponential(size=self.shape) ** 3
        self._mass = TOKENS * steep / steep.sum(1, keepdims=True)

    def drain(self) -> tuple[np.ndarray, np.ndarray]:
        return self._mass, np.full(self.shape[0], TOKENS)


def decision_times(shape: tuple[int, int], top_k: int, allocation: str) -> list[float]:
    """Milliseconds of each of `REPEATS` ticks in which a fifth of the experts is upgraded and many would move."""
    counts, settings = SteepCounts(shape, top_k), Settings(allocation=allocation, half_life=64.0)
    control = ControlLoop(HotnessTracker(counts, settings), np.ones(shape), CopyRateLimiter(None, 2**20), settings)
    rng, broken, times = np.random.default_rng(1), np.zeros(shape, dtype=bool), []
    for _ in range(REPEATS):
        counts.draw()
        upgraded = rng.random(shape) < 0.2
        start = time.perf_counter()
        control.observe(TOKENS, upgraded)
        control.decide(upgraded, broken, int(upgraded.sum()), 0)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main(json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None) -> None:
    """Time the policy."""
    rows = []
    for model, (shape, top_k) in SHAPES.items():
        for allocation in ("global", "per_layer"):
            times = decision_times(shape, top_k, allocation)
            figures = {"median_ms": statistics.median(times), "max_ms": max(times)}
            rows.append({"model": model, "allocation": allocation, **figures})
    table = Table(title=f"one decision, {REPEATS} repeats")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
