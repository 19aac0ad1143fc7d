"""Would three depths in one model beat two? Oracle assignments of int2, int4 and int8 at equal bytes, emulated.

    python benchmarks/quality/quality_three_tiers.py [--tokens 5000] [--json FILE]

Every expert is coded once and read at the depth that it is given for a phase, by an oracle that knows the phase's
traffic: the benefit of a step up is the expert's routing mass times the KL that all experts together gain by it, and
steps are bought by benefit a bit until the bytes are spent. Metadata is shared by all depths and counts once.
"""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from streams import Stream, use_one_thread
from torch import Tensor
from tqdm import tqdm

from dynaexq.cli.demo import embedded_model
from dynaexq.evaluate import evaluate
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.planning.budget import LOSS, SHARED_LOSS
from dynaexq.quantization import ExpertWeights
from dynaexq.quantization.quantize import dequantize_at, quantize

DEPTHS = (2, 4, 8)
LOSSES = {2: SHARED_LOSS["int2", "int4"], 4: LOSS["int4"], 8: LOSS["int8"]}
ALLOWED = {"int2, int4": (2, 4), "int4, int8": (4, 8), "int2, int8": (2, 8), "int2, int4, int8": DEPTHS}
CODE_BITS = (2.4, 2.8, 3.2, 3.6, 4.0, 4.4, 4.8)
GROUP_SIZE = 64


def assignment(mass: np.ndarray, allowed: tuple[int, ...], bits: float) -> np.ndarray | None:
    """Depth `[L, E]` of every expert, `bits` on average at most; None where the least depth takes more.

    Args:
        mass: routing mass `[L, E]`.
    """
    depths = np.full(mass.size, allowed[0])
    left = (bits - allowed[0]) * mass.size
    if left < 0:
        return None
    steps = [
        (-mass.flat[expert] * (LOSSES[low] - LOSSES[high]) / (high - low), expert, low, high)
        for low, high in pairwise(allowed)
        for expert in range(mass.size)
    ]
    for _, expert, low, high in sorted(steps):
        if high - low <= left and depths[expert] == low:
            depths[expert] = high
            left -= high - low
    return depths.reshape(mass.shape)


def readings(stream: Stream) -> list[dict[int, list[Tensor]]]:
    """For every layer, its two matrices `[E, N, K]` at each depth."""
    found = []
    for layer in find_sparse_layers(stream.model):
        codes = [quantize(m.data, GROUP_SIZE, fit_bits=4) for m in (layer.weights().up, layer.weights().down)]
        found.append({depth: [dequantize_at(code, depth) for code in codes] for depth in DEPTHS})
    return found


def kl(stream: Stream, layers: list[dict[int, list[Tensor]]], depths: list[np.ndarray]) -> float:
    """Mean KL of the phases, each with its own `depths [L, E]`."""
    model = copy.deepcopy(stream.model)
    losses = []
    for phase, chosen in zip(stream.phases, depths, strict=True):
        for layer, matrices, row in zip(find_sparse_layers(model), layers, chosen, strict=True):
            _write(layer.weights(), matrices, row)
        losses.append(evaluate(model, phase.windows, phase.reference).kl)
    return float(np.mean(losses))


def _write(weights: ExpertWeights, matrices: dict[int, list[Tensor]], depths: np.ndarray) -> None:
    for index, parameter in enumerate((weights.up, weights.down)):
        for expert, depth in enumerate(depths):
            parameter.data[expert].copy_(matrices[int(depth)][index][expert])


def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each phase.")] = 5_000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure and print the table."""
    use_one_thread()
    stream = Stream(model or embedded_model(), tokens)
    hotness, layers = stream.hotness().foreseen, readings(stream)
    table, results = Table("code bits per weight", *ALLOWED, title="KL of oracle assignments"), []
    for bits in tqdm(CODE_BITS, unit="budget"):
        row: dict[str, Any] = {"code bits": bits}
        for name, allowed in ALLOWED.items():
            depths = [assignment(mass, allowed, bits) for mass in hotness]
            row[name] = None if depths[0] is None else kl(stream, layers, depths)
            row[f"at int8, {name}"] = None if depths[0] is None else float(np.mean([(d == 8).mean() for d in depths]))
        table.add_row(f"{bits:.1f}", *("" if row[name] is None else f"{row[name]:.4f}" for name in ALLOWED))
        results.append(row)
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
