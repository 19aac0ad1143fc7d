"""What calibrated quantizing takes for one layer of Qwen3-30B-A3B: time per expert, for the whole model, and memory.

    python benchmarks/layers/calibrated_layer.py [--experts 14] [--tokens 32768] [--json FILE]

Random rows and weights, routed uniformly, pass through what `patch`, `from_pretrained` and `dynaexq quantize` do with
a calibration: moments of each expert from its rows, then error feedback. The model's time is that of the experts
measured times as many as it has; its memory is what the process grew by at its peak, whatever their number.
"""

import json
import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.types import ExpertShape
from dynaexq.weights.calibration import CalibrationSample, DenseMoments, Met
from dynaexq.weights.quantize_experts import encode_all

SHAPE = ExpertShape(2048, 768, up_rows=1536, has_bias=False, transposed=False)
LAYERS, EXPERTS, TOP_K = 48, 128, 8
TIERS = (("int2",), ("int4",), ("int2", "int4"))


class RandomExperts:
    """An `ExpertSource` of one layer."""

    num_layers, host_nbytes, is_lasting = 1, 0, False

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def name(self, layer: int) -> str:
        return "random experts"

    def read(self, layer: int, first: int, last: int) -> ExpertWeights:
        up = torch.randn(last - first, SHAPE.up_rows, SHAPE.hidden_size) * 0.02
        down = torch.randn(last - first, SHAPE.hidden_size, SHAPE.intermediate_size) * 0.02
        return ExpertWeights(up, down).map(lambda part: part.bfloat16())


def random_met(tokens: int) -> Met:
    rows = torch.randn(tokens, SHAPE.hidden_size).bfloat16()
    index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.short()
    return Met(rows, index, torch.full((tokens, TOP_K), 1 / TOP_K))


def silu_gate(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def peak() -> int:
    """Bytes of the process at its largest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    experts: Annotated[int, typer.Option(help="How many are quantized.")] = 14,
    tokens: Annotated[int, typer.Option(help="Rows of the layer.")] = 32768,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time each pair of tiers."""
    torch.manual_seed(0)
    met, before, rows = random_met(tokens), peak(), []
    for tiers in TIERS:
        codec = ExpertCodec(SHAPE, torch.bfloat16, tiers)
        known = CalibrationSample(("l",), {"l": silu_gate}, lambda name: met, DenseMoments(), "")
        start = time.perf_counter()
        for _ in encode_all(RandomExperts(experts), codec, torch.device("cpu"), calibration=known):
            pass
        seconds = (time.perf_counter() - start) / experts
        hours = seconds * LAYERS * EXPERTS / 3600
        rows.append({"tiers": tiers, "seconds_an_expert": seconds, "hours_of_the_model": hours})
        Console().print(f"{' + '.join(tiers)}: {seconds:.2f} s per expert, {hours:.1f} hours for all of them")
    grown = peak() - before + met.rows.nbytes
    Console().print(f"memory: {grown / 2**30:.1f} GiB, of which rows {met.rows.nbytes / 2**30:.2f}")
    if json_path:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "tokens": tokens, "nbytes": grown}
        json_path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
