"""Whether the kernels that are compiled ahead are all that a layer launches, by Triton's launcher and no GPU.

    python warm_up_program.py

Prints a line of JSON: kernels compiled ahead, kernels compiled by forwards after that, and what those forwards were.
"""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks" / "gpu"))

import host_time

from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.linear_layer import LinearLayer
from dynaexq.kernels.triton import expert_mlp, linear, warm_up
from dynaexq.quantization import ExpertCodec, LinearCodec
from dynaexq.types import ExpertShape

EXPERTS, CHOICES = 16, 2
TOKENS = (1, 5, 40, 300, 1100)
"""Of every plan: single, few, many, and beyond what one launch counts."""


class Utilities(host_time.Utilities):
    """Counts kernels as they are loaded, which each is once."""

    loaded = 0

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        Utilities.loaded += 1
        return super().load_binary(*arguments)


class Driver(host_time.Driver):
    utils = Utilities()


def layer(tiers: tuple[str, ...], activation: str | None) -> ExpertLayer:
    codec = ExpertCodec(ExpertShape(128, 64, 128, False, False), torch.bfloat16, tiers)
    base = torch.zeros(EXPERTS, codec.base.nbytes, dtype=torch.uint8)

    def gated(rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :64]

    return ExpertLayer(codec, base, gated, activation_name=activation)


def run(experts: ExpertLayer, tokens: int, dtype: torch.dtype) -> None:
    upgrades = Upgrades(torch.zeros(EXPERTS, dtype=torch.int64), lambda address: experts.base[0])
    rows = torch.zeros(tokens, 128, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, CHOICES, dtype=torch.int64)
    counts = torch.zeros(EXPERTS + 2, dtype=torch.int64)
    expert_mlp(rows, ids, torch.zeros(tokens, CHOICES, dtype=dtype), experts, upgrades, counts)


def main() -> None:
    import triton  # only now, as in `host_time`

    triton.runtime.driver.set_active(Driver())
    layers = [layer(("int2", "int4"), "silu"), layer(("int4", "fp16"), None), layer(("int2", "int4"), "silu")]
    codec = LinearCodec(192, 128, torch.bfloat16, "int4")
    dense = LinearLayer(codec, torch.zeros(codec.nbytes, dtype=torch.uint8))
    calls = warm_up.compilations(layers, [dense], CHOICES)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()
    ahead, later = Utilities.loaded, []
    for experts, tokens, dtype in itertools.product(layers, TOKENS, (torch.bfloat16, torch.float32)):
        before = Utilities.loaded
        run(experts, tokens, dtype)
        if Utilities.loaded > before:
            later.append(f"{experts.codec.tiers}, {tokens} tokens, {dtype}")
    for rows in (1, 12, 200):
        before = Utilities.loaded
        linear(torch.zeros(rows, 128, dtype=torch.bfloat16), dense)
        if Utilities.loaded > before:
            later.append(f"dense, {rows} rows")
    found = {"calls": len(calls), "ahead": ahead, "later": Utilities.loaded - ahead, "by": later}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
