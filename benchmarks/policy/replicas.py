"""Many replicas of large models: what precision removes of the error where each sees its own share of the traffic.

python benchmarks/policy/replicas.py [--tokens 8000] [--json FILE]

Made-up traffic at the shapes of Qwen3-235B-A22B and DeepSeek-V3, four phases; requests of 256 tokens go to one replica
after the other, a fifth of the experts is upgraded from int2 to int4, moves may take a tenth of a PCIe 4 link. Each
replica decides alone, or is told every 1,024 tokens of all what the others have routed.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dynaexq.settings import Settings
from dynaexq.simulator.replay import Replicas
from dynaexq.simulator.simulate import simulate
from dynaexq.traces import WORKLOADS, Trace, generate

MODELS = ("qwen3-235b", "deepseek-v3")
COUNTS = (1, 4, 16, 64)
EXCHANGE_EVERY = 1024


def measured(tokens: int) -> list[dict[str, Any]]:
    """A row for each model, number of replicas and way to learn."""
    rows = []
    for model in MODELS:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.npz"
            generate(path, WORKLOADS[model], tokens, 4)
            rows += [row_of(model, Trace(path), replicas) for replicas in fleets()]
    return rows


def fleets() -> list[Replicas]:
    """One replica, and several that are told nothing or all."""
    several = [Replicas(count, exchange_every=every) for count in COUNTS[1:] for every in (None, EXCHANGE_EVERY)]
    return [Replicas(COUNTS[0]), *several]


def row_of(model: str, trace: Trace, replicas: Replicas) -> dict[str, Any]:
    """One line of the table."""
    settings = Settings(tiers=("int2", "int4"), copy_rate_limit=0.1)
    figures = simulate(trace, settings, upgraded=0.2, replicas=replicas).figures()
    layers, experts = figures["trace"]["shape"]
    return {
        "model": model,
        "experts": f"{layers} x {experts}",
        "replicas": replicas.count,
        "told": "every 1,024 tokens" if replicas.exchange_every else "never",
        "tokens per replica and phase": figures["phases"][0]["tokens"] // replicas.count,
        **{f"removed, {name}": figures["removed"][name] for name in ("start", "average", "policy", "phase")},
        "moves per replica": figures["moves"] // replicas.count,
        "bytes told": 8 * layers * experts if replicas.exchange_every else 0,
    }


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each of four phases, of all replicas together.")] = 8000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Replay made-up traffic through 1 to 64 replicas."""
    rows = measured(tokens)
    table = Table(*rows[0], title=f"four phases of {tokens:,} tokens")
    for row in rows:
        table.add_row(*(f"{value:.1%}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console(width=200).print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
