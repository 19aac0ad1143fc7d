"""Time of one decision (rule and moves) at the shapes of real models, on one core.

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

from dynaexq.policy import slots_per_row, top_n, transitions

SHAPES = {"Qwen3-30B-A3B": (48, 128), "Qwen3-Next-80B-A3B": (48, 512)}
REPEATS = 200


def decide(score: np.ndarray, upgraded: np.ndarray, allocation: str) -> None:
    """What the controller does in one tick."""
    slots = slots_per_row(allocation, int(upgraded.sum()), len(score))
    rows = (len(slots), -1)
    wanted = top_n(score.reshape(rows), upgraded.reshape(rows), slots, 0.1).reshape(score.shape)
    transitions(score, upgraded, wanted, 0, 64)


def main(json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None) -> None:
    """Time the policy."""
    rng = np.random.default_rng(0)
    rows = []
    for model, shape in SHAPES.items():
        score, upgraded = rng.exponential(size=shape), rng.random(shape) < 0.2
        for allocation in ("global", "per_layer"):
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                decide(score, upgraded, allocation)
                times.append((time.perf_counter() - start) * 1e3)
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
