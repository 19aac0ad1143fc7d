"""What a layer and a token of Qwen3-30B-A3B should take on a GPU, by arithmetic: nothing here was measured on one.

    python benchmarks/gpu/predicted.py [--json FILE]

A layer takes the longest of three: its bytes at the memory's speed, its instructions at the speed of the schedulers,
its products at half that of the tensor cores; and its launches besides. Instructions per code are those that the
compiler emitted for each architecture (`tests/helpers/compiled_kernels.json`). A token takes 48 layers, the dense
weights, and what Transformers launches around them; without a captured graph, Python's time for each layer as well.
`benchmarks/gpu/gpu.py` measures what is predicted here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from dynaexq.kernels.triton.tuning import FEW_PAIRS, SINGLE_PAIRS
from dynaexq.quantization import tier_sizes
from dynaexq.types import ExpertShape

RECORD = json.loads((Path(__file__).parents[2] / "tests" / "helpers" / "compiled_kernels.json").read_text())

LAYERS, EXPERTS, CHOICES = 48, 128, 8
SHAPE = ExpertShape(2048, 768, 1536, False, False)
DENSE_WEIGHTS = 1_543_036_800 - 151_936 * 2048
"""Attention, head and norms, which each token reads; of the embedding it reads a row."""

MEMORY_SHARE, SCHEDULER_SHARE, TENSOR_SHARE = 0.9, 0.55, 0.5
"""Of the peak that kernels reach: a copy; a kernel with two blocks of four warps on a multiprocessor; a product."""
LAUNCHES, LAUNCH_SECONDS = 5, 2.2e-6
"""Launches of a layer of experts, and the least that one takes inside a captured graph."""
OTHER_LAUNCHES, OTHER_SECONDS = 12, 3.5e-6
"""The same of the rest of a decoder layer."""
PYTHON_SECONDS = 0.47e-3
"""Of one decoder layer without a graph: Transformers 0.35 ms, the experts' operator 0.12 (measured on a CPU)."""
TOKENS = (1, 8, 32, 128, 2048)
MIXES = {"int4": ("int4", 4), "int2 + int4, at 2 bits": ("int2+int4", 2)}


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: multiprocessors, GHz, bytes per second, and float operations of bfloat16 products."""

    multiprocessors: int
    ghz: float
    bandwidth: float
    tensor_flops: float
    architecture: str


CARDS = {
    "H100": Card(132, 1.75, 3350e9, 790e12, "90"),
    "RTX 5090": Card(170, 2.40, 1792e9, 209e12, "120"),
    "RTX 4090": Card(128, 2.50, 1008e9, 165e12, "89"),
    "A6000": Card(84, 1.70, 768e9, 155e12, "86"),
}


def layer(card: Card, mix: str, bits: int, tokens: int) -> dict[str, float]:
    """Seconds of one layer of experts for `tokens` with uniform routing, all experts read at `bits`."""
    pairs = tokens * CHOICES
    few = FEW_PAIRS * EXPERTS
    regime, block_m = ("single", 8) if pairs <= SINGLE_PAIRS else ("few", 16) if pairs <= few else ("many", 64)
    met = EXPERTS * (1 - (1 - CHOICES / EXPERTS) ** tokens)
    blocks = max(met, pairs / block_m)
    ((base, _),) = tier_sizes(SHAPE, torch.bfloat16, 64, 8, ((f"int{bits}",),))
    memory = met * base.nbytes / (card.bandwidth * MEMORY_SHARE)
    lanes = card.multiprocessors * 128 * card.ghz * 1e9 * SCHEDULER_SHARE
    weights = {"up": SHAPE.hidden_size * SHAPE.up_rows, "down": SHAPE.hidden_size * SHAPE.intermediate_size}
    per_code = {name: RECORD[f"{mix}/{name}/{regime}/{card.architecture}"][0] for name in weights}
    counted = {name: found["instructions_per_code"] for name, found in per_code.items()}
    # A loop of three steps is unrolled, and has none to count; its steps are those of the other product.
    instructions = sum(blocks * weights[name] * (counted[name] or counted["up"]) for name in weights) / lanes
    products = 2 * blocks * block_m * SHAPE.num_weights / (card.tensor_flops * TENSOR_SHARE)
    launches = LAUNCHES * LAUNCH_SECONDS
    bound = max(memory, instructions, products)
    return {
        "bytes": memory,
        "instructions": instructions,
        "products": products,
        "layer": bound + launches,
        "share of the memory's speed": memory / (bound + launches),
    }


def token(card: Card, experts: float, dense_bits: float, captured: bool) -> float:
    """Tokens per second at batch 1, where a layer of experts takes so many seconds."""
    dense = DENSE_WEIGHTS * dense_bits / 8 / (card.bandwidth * MEMORY_SHARE)
    seconds = LAYERS * (experts + OTHER_LAUNCHES * OTHER_SECONDS) + dense
    return 1 / (seconds if captured else max(seconds, LAYERS * PYTHON_SECONDS))


def main(json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None) -> None:
    """Predict, and print two tables."""
    layers: list[dict[str, Any]] = [
        {"card": name, "experts": mix, "tokens": tokens, **layer(card, *kernels, tokens)}
        for name, card in CARDS.items()
        for mix, kernels in MIXES.items()
        for tokens in TOKENS
    ]
    tokens = []
    for name, card in CARDS.items():
        found = layer(card, *MIXES["int4"], 1)
        experts = found["layer"]
        tokens.append(
            {
                "card": name,
                "eager": token(card, experts, 16, captured=False),
                "captured": token(card, experts, 16, captured=True),
                'and dense="int8"': token(card, experts, 8.25, captured=True),
                'and dense="int4"': token(card, experts, 4.25, captured=True),
            }
        )
    show("seconds of a layer, in microseconds", layers, lambda value: f"{value * 1e6:.1f}")
    show("tokens per second, one sequence", tokens, lambda value: f"{value:.0f}")
    if json_path:
        json_path.write_text(json.dumps({"layers": layers, "tokens": tokens}, indent=1) + "\n")


def show(title: str, rows: list[dict[str, Any]], as_words: Any) -> None:
    """Rows as a table; figures as `as_words` has them, shares as percentages."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(
            *(
                f"{value:.0%}"
                if name.startswith("share")
                else as_words(value)
                if isinstance(value, float)
                else str(value)
                for name, value in row.items()
            )
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    typer.run(main)
