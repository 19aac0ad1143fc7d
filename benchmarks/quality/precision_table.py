"""What one precision costs, and what upgrading a share of the experts recovers: what `tiers="auto"` decides by.

    python benchmarks/quality/precision_table.py [--model DIR] [--json FILE]

KL divergence from the model in its own dtype, nats per token, on held-out prose, code and arithmetic of
`dynaexq.cli.demo_corpus`, seen in that order; mean over the three.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from streams import LENGTH, Stream, use_one_thread
from tqdm import tqdm

from dynaexq.cli.demo import embedded_model
from dynaexq.types import ALL_TIERS

UNIFORM = sorted(tiers for tiers in ALL_TIERS if tiers == ("fp16",) or "fp16" not in tiers)
SHARES = (0.0, 0.1, 0.2, 0.33, 0.5, 1.0)


def kl(stream: Stream, share: float, **options: Any) -> dict[str, float]:
    """KL of each domain and their mean, with `share` of the experts upgraded; and the bytes of all experts."""
    outcome = stream.send(*stream.patched(share, **options))
    domains = {phase.domain: kl for phase, kl in zip(stream.phases, outcome.kl, strict=True)}
    return {"bytes": outcome.nbytes, **domains, "mean": outcome.mean_kl}


def uniform_rows(stream: Stream) -> list[dict]:
    """Every expert at one precision; a code that can be refined is another code than one that cannot."""
    rows = []
    for tiers in tqdm(UNIFORM, unit="precision"):
        name = tiers[0] if len(tiers) == 1 else f"{tiers[0]} < {tiers[1]}"
        for quantizer in ("als", "rtn") if tiers != ("fp16",) else ("als",):
            figures = kl(stream, 0.0, tiers=tiers, quantizer=quantizer, policy="frozen")
            rows.append({"precision": name, "quantizer": quantizer, **figures})
    return rows


def recovery_rows(stream: Stream) -> list[dict]:
    """int4 over int2, the upgrades following the traffic: share of the KL between none and all that is recovered."""
    rows = [{"upgraded": f"{s:.0%}", **kl(stream, s, tiers=("int2", "int4"))} for s in tqdm(SHARES)]
    low, high = rows[0]["mean"], rows[-1]["mean"]
    return [{**row, "recovered": (low - row["mean"]) / (low - high)} for row in rows]


def show(console: Console, title: str, rows: list[dict]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(
            *(v if isinstance(v, str) else f"{v:,}" if isinstance(v, int) else f"{v:.5f}" for v in row.values())
        )
    console.print(table)


def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 128 tokens a domain.")] = 24,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure both tables."""
    use_one_thread()
    stream = Stream(model or embedded_model(), windows * LENGTH)
    uniform, recovery = uniform_rows(stream), recovery_rows(stream)
    show(Console(), "all experts at one precision (base < upgrade it can take)", uniform)
    show(Console(), "int4 over int2, following the traffic", recovery)
    if json_path:
        results = {
            "torch": torch.__version__,
            "tokens_a_domain": stream.tokens_a_phase,
            "uniform": uniform,
            "recovery": recovery,
        }
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
