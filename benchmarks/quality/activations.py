"""What rounding the activations on a CPU costs: KL from 16 bit with int8 and with int16, for every precision.

    python benchmarks/quality/activations.py [--tokens 4096] [--json FILE]

The embedded model on held-out prose, code and arithmetic in turn, nats per token.
"""

import copy
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from streams import Stream, use_one_thread

import dynaexq
from dynaexq.cli.demo import embedded_model

FORMATS = (("int2", None), ("int4", None), ("int8", None), ("int4", "int8"), ("int4", "int4"), ("int8", "int8"))
"""Of experts and of dense layers."""

ACTIVATIONS = ("int16", "int8", "auto")


def kl(stream: Stream, tier: str, dense: str | None, activations: str) -> float:
    """KL of the stream's model with these formats."""
    model = copy.deepcopy(stream.model)
    dynaexq.patch(model, "1TiB", tiers=(tier,), dense=dense, config={"activations": activations})
    return stream.kl(model)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each workload.")] = 4096,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    use_one_thread()
    stream = Stream(embedded_model(), tokens)
    found = {
        f"{tier}, dense {dense}": {activations: kl(stream, tier, dense, activations) for activations in ACTIVATIONS}
        for tier, dense in FORMATS
    }
    table = Table("experts, dense layers", *(f"KL, {activations}" for activations in ACTIVATIONS), "int8 adds")
    for name, row in found.items():
        table.add_row(name, *(f"{row[of]:.6f}" for of in ACTIVATIONS), f"{row['int8'] / row['int16'] - 1:.1%}")
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
