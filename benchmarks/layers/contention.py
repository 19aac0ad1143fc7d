"""One layer of experts on a CPU whose cores other programs want as well: what one busy core costs.

    python benchmarks/layers/contention.py [--busy 1] [--json FILE]

Each variant runs by itself and beside `--busy` processes that do nothing but compute. Its fair share of the machine is
what the system would give as many runnable threads: of C cores that B others use, T threads of ours get
C * T / (T + B), and at best all of them. A ratio of 1 is a layer that is slowed down by no more than that.
`all threads` is the kernel with its choice switched off, `chosen` is the kernel as it is.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from dynaexq.kernels import ExpertLayer, Upgrades
from dynaexq.kernels.cpu import expert_mlp, interface
from dynaexq.kernels.cpu.team import Team
from dynaexq.quantization import IN_STRIPS, ExpertCodec
from dynaexq.types import ExpertShape

SHAPE = ExpertShape(hidden_size=2048, intermediate_size=768, up_rows=1536, has_bias=False, transposed=False)
EXPERTS, TOP_K = 32, 8
TOKENS = (1, 16)
SECONDS = 3.0
BUSY = "while True: pass"


class AllThreads(Team):
    """All threads, whatever that costs."""

    def observe(self, took: float, lost: float) -> None:
        pass


def make_layer() -> ExpertLayer:
    """A layer of int4 experts of random bytes."""
    codec = ExpertCodec(SHAPE, torch.bfloat16, ("int4",), arrangement=IN_STRIPS)
    base = torch.randint(0, 255, (EXPERTS, codec.base.nbytes), dtype=torch.uint8)
    for name in codec.matrices:
        codec.base_layout.view(base)[f"{name}.unit"].fill_(1)
    gate = lambda rows: torch.nn.functional.silu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1]  # noqa: E731
    return ExpertLayer(codec, base, gate, activation_name="silu")


def milliseconds(layer: ExpertLayer, tokens: int) -> float:
    """Mean time of a forward over `SECONDS`, what is lost included."""
    rows = torch.randn(tokens, SHAPE.hidden_size, dtype=torch.bfloat16)
    weights = torch.full((tokens, TOP_K), 1 / TOP_K)
    upgrades = Upgrades(torch.zeros(EXPERTS, dtype=torch.int64), lambda address: rows)
    draws = [torch.rand(tokens, EXPERTS).topk(TOP_K).indices for _ in range(8)]
    for ids in draws:
        expert_mlp(rows, ids, weights, layer, upgrades)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        expert_mlp(rows, draws[count % 8], weights, layer, upgrades)
        count += 1
    return 1e3 * (time.perf_counter() - start) / count


def beside(busy: int, measure: Callable[[], float]) -> float:
    """What `measure` finds while `busy` other processes compute."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        time.sleep(0.3)
        return measure()
    finally:
        for other in others:
            other.kill()
            other.wait()


def fair(cores: int, threads: int, busy: int) -> float:
    """Cores that `threads` of ours get among `busy` others."""
    return min(threads, cores * threads / (threads + busy))


def main(busy: int = 1, json_path: Annotated[Path | None, typer.Option("--json")] = None) -> None:
    cores, layer = os.cpu_count() or 1, make_layer()
    table = Table("tokens", "variant", "alone, ms", "beside, ms", "slower", "than its fair share")
    rows = []
    for tokens in TOKENS:
        for name, new_team in (("all threads", AllThreads), ("chosen", Team), ("one thread", None)):
            interface.team = (new_team or AllThreads)()
            torch.set_num_threads(cores if new_team else 1)
            alone = statistics.median(milliseconds(layer, tokens) for _ in range(3))
            slow = statistics.median(beside(busy, lambda: milliseconds(layer, tokens)) for _ in range(3))  # noqa: B023
            threads = torch.get_num_threads()
            ratio = slow / alone / (threads / fair(cores, threads, busy))
            rows.append(
                {"tokens": tokens, "variant": name, "alone_ms": alone, "beside_ms": slow, "ratio_to_fair": ratio}
            )
            table.add_row(str(tokens), name, f"{alone:.3f}", f"{slow:.3f}", f"{slow / alone:.2f}", f"{ratio:.2f}")
    Console().print(table)
    if json_path is not None:
        machine = {"machine": platform.processor() or platform.machine(), "cores": cores, "busy": busy}
        json_path.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
