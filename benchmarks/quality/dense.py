"""What packing the dense layers costs: KL from 16 bit and bytes, for every format, with experts in 16 and in 4 bit.

    python benchmarks/quality/dense.py [--tokens 8192] [--json FILE]

The embedded model on held-out prose, code and arithmetic in turn, nats per token. `dense` is what `patch` is told. Our
own formats pack the head as well, in 6 bits at least unless it says otherwise, which this model shares with its
embedding, so that it has bytes of its own then; bitsandbytes leaves it in 16 bit. Calibrated means on words of the
model's own, experts as well as dense layers. Bytes are of dense weights, embedding included.
"""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from streams import WEIGHTS_ALONE, Stream, use_one_thread

import dynaexq
from dynaexq.cli.demo import embedded_model

FORMATS = (None, "int8", "int6", "int4", "bnb-8bit", "bnb-4bit")
HEADS = ("int8", "int4")
PACKED = (None, "int8", "int6", "int4")
EXPERTS = ("fp16", "int4")
CALIBRATED = "%s, calibrated"


def measured(stream: Stream, dense: str | None, tier: str, **options: Any) -> dict[str, Any]:
    """KL and dense bytes of the stream's model with these formats."""
    model = copy.deepcopy(stream.model)
    runtime = dynaexq.patch(model, "1TiB", tiers=(tier,), dense=dense, config=WEIGHTS_ALONE | options)
    return {"kl": stream.kl(model), "dense_bytes": runtime.memory()["dense"]}


def of_experts(stream: Stream, tier: str, moments: Path) -> dict[str, Any]:
    """The same by format, with experts at `tier`."""
    plain = {str(dense): measured(stream, dense, tier) for dense in FORMATS}
    heads = {f"int4, head {head}": measured(stream, "int4", tier, head=head) for head in HEADS}
    calibrated = {CALIBRATED % dense: measured(stream, dense, tier, calibration=moments) for dense in PACKED}
    return plain | heads | calibrated


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each workload.")] = 8192,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    use_one_thread()
    stream = Stream(embedded_model(), tokens)
    with TemporaryDirectory() as directory:
        moments = Path(directory) / "moments.safetensors"
        dynaexq.calibrate(stream.model, moments)
        found = {tier: of_experts(stream, tier, moments) for tier in EXPERTS}
    table = Table("dense", "MB", *(f"KL, experts {tier}" for tier in EXPERTS), "added to int4 experts'")
    for dense in found["int4"]:
        rows = [found[tier][dense] for tier in EXPERTS]
        alone = found["int4"][CALIBRATED % None if "calibrated" in dense else "None"]["kl"]
        table.add_row(
            dense,
            f"{rows[0]['dense_bytes'] / 1e6:.2f}",
            *(f"{row['kl']:.5f}" for row in rows),
            f"{rows[1]['kl'] / alone - 1:.1%}",
        )
    Console(width=120).print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
