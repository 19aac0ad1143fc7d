"""Whole models on the CPU: tokens per second patched and unpatched, and what the control of precision costs.

    python benchmarks/models/cpu_model.py [--threads 2] [--json FILE]

The embedded model, and two layers of the shape of Qwen3-30B-A3B with 64 of its 128 experts and random weights. Greedy
decoding with a cache, one token a step; contestants take turns of a few tokens, and figures are medians over the
tokens. *Control* is what a frozen model would do without: ticks, and counting where that is not part of the kernel.
"""

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import dynaexq
from dynaexq.cli.demo import embedded_model
from dynaexq.runtime.experts import MixedPrecisionExperts

TIER_CHOICES = (("int2",), ("int4",), ("int2", "int4"), ("int4", "int8"))
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
UPGRADED_SHARE = 0.2
PROMPT, TURN, TURNS = 32, 16, 8


class Decoder:
    """One model writing on and on, token by token."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.times = model, list[float]()
        output = model(torch.arange(PROMPT)[None], use_cache=True)
        self._cache, self._next = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def turn(self) -> None:
        """Write a few tokens and keep their times."""
        for _ in range(TURN):
            start = time.perf_counter()
            output = self.model(self._next, past_key_values=self._cache)
            self._next = output.logits[:, -1:].argmax(-1)
            self.times.append(time.perf_counter() - start)


class Control:
    """Seconds a patched model spends in counting and in ticks."""

    def __init__(self, model: PreTrainedModel):
        self.seconds = 0.0
        layers = [module for module in model.modules() if isinstance(module, MixedPrecisionExperts)]
        ports = layers[0]._ports
        ports.before_forward = self._timed(ports.before_forward)
        ports.memory.counter.observe = self._timed(ports.memory.counter.observe)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result

        return run


def two_layers() -> PreTrainedModel:
    """The layers of Qwen3-30B-A3B under a small vocabulary; the weights are random."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=2,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def embedded() -> PreTrainedModel:
    """The model that ships with dynaexq."""
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="auto").eval()


def patched(model: PreTrainedModel, tiers: tuple[str, ...]) -> PreTrainedModel:
    """A patched copy with a fifth of its experts upgraded."""
    model = copy.deepcopy(model)
    runtime = dynaexq.patch(model, "1TiB", tiers=tiers, device="cpu", config=dynaexq.DynaExqConfig(quantizer="rtn"))
    memory, slots = runtime.memory(), runtime.plan.num_slots
    runtime.set_budget(
        memory["total"] - (slots - round(UPGRADED_SHARE * slots)) * runtime.plan.upgrade.nbytes if slots else 2**40
    )
    return model


def measure(name: str, model: PreTrainedModel) -> list[dict]:
    """Tokens per second of every contestant, its ratio to the best unpatched one, and the share of control."""
    decoders, controls = {}, {}
    for tiers in TIER_CHOICES:
        decoders["dynaexq " + "+".join(tiers)] = decoder = Decoder(patched(model, tiers))
        controls["dynaexq " + "+".join(tiers)] = Control(decoder.model)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        decoders[f"transformers {implementation}"] = Decoder(model)
    for _ in range(TURNS):
        for contestant, decoder in decoders.items():
            if contestant.startswith("transformers"):
                model.set_experts_implementation(contestant.split()[1])
            decoder.turn()
    speed = {contestant: 1 / statistics.median(decoder.times) for contestant, decoder in decoders.items()}
    best = max(value for contestant, value in speed.items() if contestant.startswith("transformers"))
    return [
        {
            "model": name,
            "contestant": contestant,
            "tokens_a_second": speed[contestant],
            "times_best_transformers": speed[contestant] / best,
            "control_share": controls[contestant].seconds / sum(decoder.times) if contestant in controls else None,
        }
        for contestant, decoder in decoders.items()
    ]


def show(rows: list[dict]) -> None:
    table = Table(title="decoding, one token a step")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    Console(width=120).print(table)


@torch.no_grad()
def main(
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure both models."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    load, rows = os.getloadavg()[0], []
    for name, build in (
        ("embedded, 4 layers of 32", embedded),
        ("two layers of Qwen3-30B-A3B, 64 experts", two_layers),
    ):
        rows += measure(name, build())
        show([row for row in rows if row["model"] == name])
    if json_path:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": threads, "torch": torch.__version__}
        results = {**machine, "load_before": load, "upgraded_share": UPGRADED_SHARE, "rows": rows}
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
