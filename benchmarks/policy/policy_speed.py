"""Time of one decision (hotness, watch, rule and moves) at the shapes of real models, on one core.

python benchmarks/policy/policy_speed.py [--json FILE]
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

from dynaexq.policy.controller import ControlLoop, Window
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.settings import Settings
from dynaexq.types import Transition

SHAPES = {"Qwen3-30B-A3B": ((48, 128), 8), "Qwen3-Next-80B-A3B": ((48, 512), 10)}
REPEATS = 200
TOKENS = 8
"""Tokens between two decisions."""


class FullSlots:
    """Slots that are all taken; see `policy.Slots`. What is submitted begins and changes nothing."""

    allowance, num_free = None, 0

    def __init__(self, upgraded: np.ndarray):
        self.upgraded, self.barred = upgraded, np.zeros_like(upgraded)
        self.num_slots = int(upgraded.sum())

    def submit(self, move: Transition) -> bool:
        return True

    def tick(self) -> None:
        """No copy fails."""

    def settle(self) -> None:
        pass

    def reclaim(self) -> None:
        pass


def steep_mass(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Routing mass `[L, E]` of `TOKENS` tokens, most of it on few experts."""
    steep = rng.exponential(size=shape) ** 3
    return TOKENS * steep / steep.sum(1, keepdims=True)


def tick_times(shape: tuple[int, int], top_k: int, allocation: str) -> list[float]:
    """Milliseconds of each of `REPEATS` ticks in which a fifth of the experts is upgraded and many would move."""
    settings = Settings(allocation=allocation, half_life=64.0)
    control = ControlLoop(shape, np.ones(shape), CopyRateLimiter(None, 2**20), settings)
    rng, tokens, times = np.random.default_rng(1), np.full(shape[0], TOKENS), []
    for _ in range(REPEATS):
        upgraded = rng.random(shape) < 0.2
        window = Window(steep_mass(shape, rng), tokens, TOKENS, top_k, upgraded)
        slots = FullSlots(upgraded)
        start = time.perf_counter()
        control.step(window, slots)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main(json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None) -> None:
    """Time the policy."""
    rows = []
    for model, (shape, top_k) in SHAPES.items():
        for allocation in ("global", "per_layer"):
            times = tick_times(shape, top_k, allocation)
            figures = {"median_ms": statistics.median(times), "max_ms": max(times)}
            rows.append({"model": model, "allocation": allocation, **figures})
    table = Table(title=f"one tick, {REPEATS} repeats")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
