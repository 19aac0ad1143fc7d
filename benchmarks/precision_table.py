"""What one precision costs, what upgrading a share of the experts recovers, and what the dials of control change.

The first two tables are what `tiers="auto"` decides by; the third is why the defaults are what they are.

    python benchmarks/precision_table.py [--model DIR] [--json FILE]

KL divergence from the model in its own dtype, nats a token, on held-out prose, code and arithmetic of
`dynaexq.corpus`, seen in that order; mean over the three.
"""

import copy
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaexq
from dynaexq.corpus import DOMAINS, documents
from dynaexq.demo import embedded_model
from dynaexq.evaluate import evaluate, reference_logits, windows_of

UNIFORM = (("int2",), ("int2", "int4"), ("int4",), ("int4", "int8"), ("int8",), ("fp16",))
SHARES = (0.0, 0.1, 0.2, 0.33, 0.5, 1.0)
DIALS = (
    {},
    {"allocation": "per_layer"},
    {"half_life": 256},
    {"half_life": 1024},
    {"half_life": 2048},
    {"alpha": 0.9},
    {"margin": 0.0},
    {"policy": "frozen"},
)


class Stream:
    """Windows of the three domains and what the original model says to them."""

    def __init__(self, path: Path, windows: int):
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager").eval()
        self.windows = {domain: windows_of(tokenizer, documents(domain), windows, 128) for domain in DOMAINS}
        self.reference = {domain: reference_logits(self.model, ws) for domain, ws in self.windows.items()}

    def kl(self, share: float, **dials) -> dict[str, float]:
        """KL of each domain and their mean, with `share` of the experts upgraded; and the bytes of all experts."""
        model = copy.deepcopy(self.model)
        runtime = dynaexq.patch(model, "1TiB", **dials)
        memory, slots = runtime.memory(), runtime.plan.num_slots
        if slots:
            slot = memory["upgrade"] // slots
            runtime.set_budget(memory["total"] - memory["upgrade"] + round(share * slots) * slot)
        kl = {domain: evaluate(model, ws, self.reference[domain]).kl for domain, ws in self.windows.items()}
        memory = runtime.memory()
        return {"bytes": memory["base"] + memory["upgrade"], **kl, "mean": sum(kl.values()) / len(kl)}


def uniform_rows(stream: Stream) -> list[dict]:
    """Every expert at one precision; a code that can be refined is another code than one that cannot."""
    rows = []
    for tiers in tqdm(UNIFORM, unit="precision"):
        name = tiers[0] if len(tiers) == 1 else f"{tiers[0]} < {tiers[1]}"
        for quantizer in ("als", "rtn") if tiers != ("fp16",) else ("als",):
            figures = stream.kl(0.0, tiers=tiers, quantizer=quantizer, policy="frozen")
            rows.append({"precision": name, "quantizer": quantizer, **figures})
    return rows


def recovery_rows(stream: Stream) -> list[dict]:
    """int4 over int2, the upgrades following the traffic: share of the KL between none and all that is recovered."""
    rows = [{"upgraded": f"{s:.0%}", **stream.kl(s, tiers=("int2", "int4"), tick_every=1)} for s in tqdm(SHARES)]
    low, high = rows[0]["mean"], rows[-1]["mean"]
    return [{**row, "recovered": (low - row["mean"]) / (low - high)} for row in rows]


def dial_rows(stream: Stream) -> list[dict]:
    """int4 over a fifth of int2, one dial changed at a time."""
    rows = []
    for dials in tqdm(DIALS, unit="dial"):
        name = ", ".join(f"{dial}={value}" for dial, value in dials.items()) or "defaults"
        rows.append({"dial": name, **stream.kl(0.2, tiers=("int2", "int4"), tick_every=1, **dials)})
    return rows


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
    """Measure the three tables."""
    torch.set_num_threads(1)
    stream = Stream(model or embedded_model(), windows)
    uniform, recovery, dials = uniform_rows(stream), recovery_rows(stream), dial_rows(stream)
    show(Console(), "all experts at one precision (base < upgrade it can take)", uniform)
    show(Console(), "int4 over int2, following the traffic", recovery)
    show(Console(), "a fifth upgraded, one dial changed at a time", dials)
    if json_path:
        results = {
            "torch": torch.__version__,
            "tokens_a_domain": windows * 128,
            "uniform": uniform,
            "recovery": recovery,
            "dials": dials,
        }
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
