"""One layer of experts on the CPU: packed formats against every implementation of Transformers, in one process.

    python benchmarks/layers/cpu_layer.py [--threads 2] [--cpu-time] [--llama TREE] [--json FILE]

Every round draws new rows and a new uniform routing and runs all contestants on them, in a new order; figures are
medians over the rounds. A mixed layer has a fifth of its experts, and so of its traffic, upgraded. Weights are random
bytes: what they mean changes no time. Before anything is timed, each format is compared with the reference.

On a machine that others load, `--threads 1 --cpu-time` counts only the time in which the thread had a core.

The outside yardsticks are onnxruntime's MatMulNBits (int4, groups of 64, int8 activations) on as many experts at 1
token, which is skipped where onnx and onnxruntime are not installed, and llama.cpp's own tensors where its tree is
given, compiled as `llama_experts.py` says.
"""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from llama_experts import LlamaExperts, build
from onnx_experts import onnx_experts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dynaexq.kernels import ExpertLayer, Upgrades, cpu, reference
from dynaexq.memory import allocate_bytes
from dynaexq.quantization import IN_STRIPS, ExpertCodec
from dynaexq.types import ExpertShape

UPGRADED_SHARE = 0.2
ROUNDS = {1: 40, 4: 20, 16: 8, 64: 5, 512: 3}
WAKING = 2**20
PAUSE = 0.05  # seconds after what has threads of its own, which go on spinning for a while on the cores of the next
LLAMA_TYPES = ("q2_K", "q4_0", "q4_K", "q8_0")
TIER_CHOICES = (
    ("int2",),
    ("int3",),
    ("int4",),
    ("int6",),
    ("int8",),
    ("int2", "int3"),
    ("int2", "int4"),
    ("int3", "int4"),
    ("int2", "int8"),
    ("int4", "int8"),
    ("int4", "fp16"),
)

Routing = tuple[Tensor, Tensor, Tensor]


class Model(NamedTuple):
    """One layer of experts as a model has it, and how many of its experts are held here."""

    name: str
    num_experts: int
    experts_here: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    @property
    def weights(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size


MODELS = (Model("Qwen3-30B-A3B", 128, 128, 8, 2048, 768), Model("Qwen3-Next-80B-A3B", 512, 256, 10, 2048, 512))


class Packed:
    """Random experts in one pair, on slabs like those of a patched model."""

    def __init__(self, model: Model, tiers: tuple[str, ...], scale_bits: int = 8):
        gated = ExpertShape(model.hidden_size, model.intermediate_size, 2 * model.intermediate_size, False, False)
        self.codec = codec = ExpertCodec(gated, torch.bfloat16, tiers, scale_bits=scale_bits, arrangement=IN_STRIPS)
        base = self._random(model.experts_here, codec.base.nbytes)
        self._give_scales(codec, codec.base_layout.view(base))
        entries = torch.zeros(model.experts_here, dtype=torch.int64)
        self.upgrades = torch.empty(0)
        if codec.upgrade:
            upgraded = range(0, model.experts_here, round(1 / UPGRADED_SHARE))
            self.upgrades = self._random(len(upgraded), codec.upgrade.nbytes)
            if codec.replaces:
                self.upgrades.view(torch.bfloat16).normal_(0, 0.02)
            for row, expert in zip(self.upgrades, upgraded, strict=True):
                entries[expert] = row.data_ptr() | codec.upgrade.bits
        rows = {row.data_ptr(): row for row in self.upgrades}
        self.row = Upgrades(entries, rows.__getitem__)
        self.layer = ExpertLayer(codec, base, _silu_gate, None, "silu")

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return cpu.expert_mlp(hidden_states, top_k_index, top_k_weights, self.layer, self.row)

    def bytes_read(self, top_k_index: Tensor) -> int:
        """Bytes of the experts that a routing needs."""
        codec, experts = self.codec, top_k_index.unique()
        upgraded = int((self.row.entries[experts] != 0).sum())
        upgrade = codec.upgrade.nbytes if codec.upgrade else 0
        instead = codec.base.nbytes if codec.replaces else 0
        return len(experts) * codec.base.nbytes + upgraded * (upgrade - instead)

    def check(self, routing: Routing) -> None:
        """Raise unless this layer gives what the reference gives."""
        expected = reference.expert_mlp(*routing, self.layer, self.row)
        exact = replace(self.layer, activations="int16", prepared={})  # int8 is rounded on purpose
        output = cpu.expert_mlp(*routing, exact, self.row)
        error = float((output - expected).norm() / expected.norm())
        if error > 1.5 * 2**-7:
            raise AssertionError(f"{self.codec.tiers} differs from the reference by {error:.3g}; nothing is timed")

    @staticmethod
    def _give_scales(codec: ExpertCodec, parts: dict[str, Tensor]) -> None:
        """The same to all groups: a scale of 0.005, and zero in the middle."""
        form = codec.form.of_weights(torch.tensor([-0.04, 0.04]).expand(1, 1, 2))
        grid = form.rounded(torch.full((1, 1), 0.005), torch.zeros(1, 1), 8.0)
        numbers = form.pack(grid)[0, 0]
        for name in codec.matrices if codec.planes else ():
            meta = parts[f"{name}.meta"]
            groups = meta.shape[1] * meta.shape[3]
            alike = numbers.expand(len(meta), groups, meta.shape[2], 2)
            codec.arrangement.write_meta(meta, slice(None), alike)
            form.write_unit(parts, name)

    def _random(self, count: int, nbytes: int) -> Tensor:
        block = allocate_bytes(count * nbytes, torch.device("cpu"))
        block.view(torch.int64).random_()
        return block.view(count, nbytes)


def _silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Original:
    """The experts of Transformers in bfloat16, run by each of its implementations."""

    def __init__(self, model: Model):
        self._weights = model.weights
        config = Qwen3MoeConfig(
            hidden_size=model.hidden_size,
            moe_intermediate_size=model.intermediate_size,
            num_experts=model.experts_here,
            hidden_act="silu",
        )
        with torch.device("meta"):
            self._experts = Qwen3MoeExperts(config)
        self._experts = self._experts.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in self._experts.parameters():
            parameter.normal_(0, 0.02)

    def by(self, implementation: str) -> Callable[..., Tensor]:
        def run(*routing: Tensor) -> Tensor:
            self._experts.config._experts_implementation = implementation
            return self._experts(*routing)

        return run

    def bytes_read(self, top_k_index: Tensor) -> int:
        return len(top_k_index.unique()) * 2 * self._weights


def routing_of(model: Model, num_tokens: int) -> Routing:
    """Random rows, uniformly routed."""
    index = torch.rand(num_tokens, model.experts_here).argsort(1)[:, : model.top_k]
    rows = torch.randn(num_tokens, model.hidden_size, dtype=torch.bfloat16)
    return rows, index, torch.rand(index.shape).to(torch.bfloat16)


def timed(clock: Callable[[], float], function: Callable[..., object], *args: object) -> float:
    start = clock()
    function(*args)
    return clock() - start


def measure(
    model: Model,
    num_tokens: int,
    original: Original,
    packed: dict[str, Packed],
    others: dict[str, LlamaExperts],
    memory: Tensor,
    clock: Callable[[], float],
) -> list[dict]:
    """Median time of each contestant, its speed-up over the best of Transformers, and its bytes per second."""
    implementations = ["eager", "grouped_mm"] + ["batched_mm"] * (num_tokens == 1)
    run = {f"transformers {name}, bf16": original.by(name) for name in implementations}
    run |= {f"dynaexq {name}": layer for name, layer in packed.items()}
    strangers = {f"llama.cpp {name}": layer for name, layer in others.items()}
    yardstick = onnx_experts(model) if num_tokens == 1 else None
    if yardstick:
        strangers["onnxruntime MatMulNBits int4"] = yardstick
    run |= strangers
    times: dict[str, list[float]] = {name: [] for name in run}
    rates: dict[str, list[float]] = {name: [] for name in run}
    bandwidth = 0.0
    for _ in range(ROUNDS[num_tokens]):
        routing = routing_of(model, num_tokens)
        for name in random.sample(list(run), len(run)):  # the one after batched_mm finds the caches swept
            function = run[name]
            memory[:WAKING].sum()  # PyTorch's threads are awake, as they are inside a model
            seconds = timed(clock, function, *routing)
            times[name].append(seconds)
            source = function if hasattr(function, "bytes_read") else original
            rates[name].append(source.bytes_read(routing[1]) / seconds)
            if name in strangers:
                time.sleep(PAUSE)
        bandwidth = max(bandwidth, memory.nbytes / timed(clock, memory.sum))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(value for name, value in medians.items() if name.startswith("transformers"))
    return [
        {
            "model": model.name,
            "tokens": num_tokens,
            "experts": name,
            "median_ms": 1e3 * medians[name],
            "times_best_transformers": best / medians[name],
            "gb_a_second": statistics.median(rates[name]) / 1e9,
            "share_of_bandwidth": statistics.median(rates[name]) / bandwidth,
        }
        for name in run
    ]


def show(rows: list[dict]) -> None:
    table = Table(title="one layer of experts, medians")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)


@torch.no_grad()
def main(
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    llama: Annotated[Path | None, typer.Option(help="A source tree of llama.cpp, built.")] = None,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Count the thread's time on a core only.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure every pair at 1, 4, 16, 64 and 512 tokens."""
    if cpu_time and threads != 1:
        raise typer.BadParameter("--cpu-time tells the time of one thread; add --threads 1")
    clock = time.thread_time if cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    memory = torch.ones(2**28)  # 1 GiB, far beyond any cache
    library = build(llama) if llama else None
    rows, load = [], os.getloadavg()[0]
    for model in MODELS:
        original = Original(model)
        packed = {"+".join(tiers): Packed(model, tiers) for tiers in TIER_CHOICES}
        packed |= {f"{tier}, 16-bit scales": Packed(model, (tier,), scale_bits=16) for tier in ("int2", "int4")}
        for layer in packed.values():
            layer.check(routing_of(model, 3))
        others = {kind: LlamaExperts(library, kind, model) for kind in LLAMA_TYPES} if library else {}
        for num_tokens in ROUNDS:
            rows += measure(model, num_tokens, original, packed, others, memory, clock)
            show([row for row in rows if (row["model"], row["tokens"]) == (model.name, num_tokens)])
        if json_path:
            machine = {"cpu": platform.machine(), "threads": threads, "cpu_time": cpu_time, "torch": torch.__version__}
            facts = {"load_before": load, "upgraded_share": UPGRADED_SHARE, "models": [m._asdict() for m in MODELS]}
            json_path.write_text(json.dumps({**machine, **facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
