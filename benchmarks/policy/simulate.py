"""What must hold at the scale of real models, on made-up traffic: a shift is followed, flat traffic is left alone.

python benchmarks/policy/simulate.py [--tokens 4000] [--json FILE]

Moves may take a tenth of a PCIe 4 link (25 GB/s); 50 tokens per second; a fifth of the experts is upgraded.
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dynaexq.settings import Settings
from dynaexq.simulator.simulate import simulate
from dynaexq.traces import WORKLOADS, Trace, generate

TIER_CHOICES = (("int2", "int4"), ("int4", "int8"))
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("defaults", "qwen3-30b", {}),
    ("never paused", "qwen3-30b", {"auto_pause": False}),
    ("hysteresis 0", "qwen3-30b", {"hysteresis": 0.0}),
    ("hysteresis 1", "qwen3-30b", {"hysteresis": 1.0}),
    ("half-life 64", "qwen3-30b", {"half_life": 64}),
    ("half-life 64, hysteresis 2", "qwen3-30b", {"half_life": 64, "hysteresis": 2.0}),
    ("half-life 512, hysteresis 0.1", "qwen3-30b", {"half_life": 512, "hysteresis": 0.1}),
    ("per layer", "qwen3-30b", {"allocation": "per_layer"}),
    ("alpha 0.9", "qwen3-30b", {"alpha": 0.9}),
    ("frozen", "qwen3-30b", {"policy": "frozen"}),
    ("defaults", "qwen3-next-80b", {}),
    ("half-life 64", "qwen3-next-80b", {"half_life": 64}),
    ("defaults", "flat", {}),
    ("never paused", "flat", {"auto_pause": False}),
    ("defaults", "still", {}),
    ("never paused", "still", {"auto_pause": False}),
]
STILL = replace(WORKLOADS["qwen3-30b"], drift=0.0, locality=0.0)
"""Phases within which nothing changes, long enough for moves to pause before the shift."""


def row_of(case: str, workload: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    shifted = [phase["tokens_to_90_percent"] for phase in figures["phases"][1:]]
    return {
        "workload": workload,
        "case": case,
        "tiers": "/".join(figures["tiers"]),
        **{f"coverage_{name}": share for name, share in figures["coverage"].items()},
        "tokens_to_90_percent": max(shifted, default=0),
        "moves_per_1000_tokens_per_slot": figures["moves_per_1000_tokens_per_slot"],
        "bytes_moved": figures["bytes_moved"],
        "share_of_link": figures["share_of_link"],
        "share_paused": figures["share_paused"],
        "worth_it": figures["verdict"]["worth_it"],
    }


def measured(tokens: int) -> list[dict[str, Any]]:
    """Every case on the traces they share."""
    rows = []
    with TemporaryDirectory() as scratch:
        traces = {name: Path(scratch) / f"{name}.npz" for _, name, _ in CASES if name in WORKLOADS}
        for name, path in traces.items():
            generate(path, WORKLOADS[name], tokens, 4)
        traces["still"] = Path(scratch) / "still.npz"
        generate(traces["still"], STILL, 10_000, 2)
        for case, workload, options in CASES:
            for tiers in TIER_CHOICES if not options else TIER_CHOICES[:1]:
                settings = Settings(tiers=tiers, copy_rate_limit=0.1, **options)
                figures = simulate(Trace(traces[workload]), settings, upgraded=0.2).figures()
                rows.append(row_of(case, workload, figures))
    return rows


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each of four phases.")] = 4000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Replay made-up traffic through the policy, one option changed at a time."""
    rows = measured(tokens)
    table = Table(title=f"four phases of {tokens:,} tokens; still: two of 10,000")
    shown = [name for name in rows[0] if name not in ("bytes_moved", "coverage_start")]
    for name in shown:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{row[n]:.4f}" if isinstance(row[n], float) else str(row[n]) for n in shown))
    Console(width=200).print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
