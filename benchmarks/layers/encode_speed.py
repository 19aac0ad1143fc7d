"""Weights per second that one core quantizes, at the shapes of real experts: what `dynaexq plan` takes for start-up.

python benchmarks/layers/encode_speed.py [--json FILE]

One thread, and its processor time: what else the machine has to do counts little.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.types import ExpertShape

SHAPES = {"Qwen3-30B-A3B": (2048, 768), "Qwen3-Next-80B-A3B": (2048, 512)}
TIERS = (("int4",), ("int4", "int8"), ("int2", "int4"), ("int4", "fp16"))
REPEATS = 5


def main(json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None) -> None:
    """Time the quantizers."""
    torch.set_num_threads(1)
    rows = []
    for model, (hidden, intermediate) in SHAPES.items():
        shape = ExpertShape(hidden, intermediate, 2 * intermediate, has_bias=False, transposed=False)
        up, down = torch.randn(1, 2 * intermediate, hidden), torch.randn(1, hidden, intermediate)
        weights = ExpertWeights(up, down).map(lambda part: (part * 0.02).bfloat16())
        for quantizer in ("als", "rtn"):
            for tiers in TIERS:
                codec = ExpertCodec(shape, torch.bfloat16, tiers, method=quantizer)
                seconds = min(_encode_seconds(codec, weights) for _ in range(REPEATS))
                rate = shape.num_weights / seconds / 1e6
                rows.append({"model": model, "quantizer": quantizer, "tiers": tiers, "million_weights_a_second": rate})
    table = Table(title=f"million weights per second, one core, best of {REPEATS}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        *names, rate = row.values()
        table.add_row(*(" + ".join(name) if isinstance(name, tuple) else name for name in names), f"{rate:.1f}")
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


def _encode_seconds(codec: ExpertCodec, weights: ExpertWeights) -> float:
    start = time.process_time()
    codec.encode(weights)
    return time.process_time() - start


if __name__ == "__main__":
    typer.run(main)
