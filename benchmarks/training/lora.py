"""LoRA on a patched model beside the plain one: loss on the embedded model, seconds and memory on experts of the 30B.

    python benchmarks/training/lora.py [--steps 20] [--json FILE]

Both train the same adapter of the attention, from the same start, on the same text, which is new to them; the adapter
of the patched model is then saved and loaded on both. Time and memory are those of one step of 64 tokens on a random
Qwen3-MoE with two layers of 64 experts of the shape of Qwen3-30B-A3B (1.2 GB), at 420 MB, each model in a process of
its own; memory is anonymous resident bytes above those before the step, sampled every two milliseconds.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import dynaexq
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.evaluate import evaluate, windows_of

LENGTH, BATCH, WINDOWS = 64, 4, 32
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TIERS = ("int4", "int8")
BUDGET, TOKENS, RUNS = "420MB", 64, 5
KINDS = ("plain", "patched")


def plain_model() -> Any:
    """The embedded model in float32, so that both learn from gradients of the same precision."""
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)


def patched_model() -> Any:
    model = plain_model()
    dynaexq.patch(model, "1GiB", tiers=TIERS)
    runtime = model.dynaexq
    runtime.set_budget(runtime.memory()["total"] - runtime.memory()["upgrade"] * 3 // 4)
    return model


def text(split: str) -> list[Tensor]:
    """Windows of prose, code and arithmetic in turn, upper and lower case exchanged: new to the model."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    texts = {domain: (document.swapcase() for document in documents(domain, split)) for domain in DOMAINS}
    found = [windows_of(tokenizer, texts[domain], WINDOWS, LENGTH) for domain in DOMAINS]
    return [window for windows in zip(*found, strict=True) for window in windows]


def with_adapter(model: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def train(adapted: peft.PeftModel, steps: int) -> list[float]:
    """The loss of every step."""
    windows, losses = text("train"), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        ids = torch.stack([windows[(step * BATCH + i) % len(windows)] for i in range(BATCH)])
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def learn(steps: int) -> dict[str, Any]:
    """Losses while both learn, and on held-out text before, after, and with the saved adapter on the other model."""
    held_out, found = text("held-out"), {}
    with tempfile.TemporaryDirectory() as directory:
        for kind, make in zip(KINDS, (plain_model, patched_model), strict=True):
            adapted = with_adapter(make())
            before = evaluate(adapted, held_out).loss
            losses = train(adapted, steps)
            found[kind] = {"steps": losses, "before": before, "after": evaluate(adapted, held_out).loss}
            adapted.save_pretrained(Path(directory) / kind)
        for kind, make in zip(KINDS, (plain_model, patched_model), strict=True):
            loaded = peft.PeftModel.from_pretrained(make(), Path(directory) / "patched")
            found[kind]["adapter_of_patched"] = evaluate(loaded, held_out).loss
    return found


def large_model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=2,
        num_experts=64,
        num_experts_per_tok=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    return Qwen3MoeForCausalLM(config)


def anonymous_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Peak:
    """The most anonymous memory while it is open, above that at its beginning."""

    def __enter__(self) -> "Peak":
        self._start = self._most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.nbytes = self._most - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, anonymous_bytes())


def step_of_large(kind: str) -> dict[str, float]:
    """Seconds of a forward without gradients and of a step, and what a step takes of memory beyond the model."""
    model = large_model()
    if kind == "patched":
        dynaexq.patch(model, BUDGET, tiers=TIERS, policy="frozen", config={"quantizer": "rtn"})
    adapted = with_adapter(model)
    ids = torch.randint(0, 8192, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"forward": [], "step": []}
    peaks = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        with torch.no_grad():
            adapted(ids)
        seconds["forward"].append(time.perf_counter() - start)
        with Peak() as peak:
            start = time.perf_counter()
            adapted(ids, labels=ids).loss.backward()
            seconds["step"].append(time.perf_counter() - start)
        peaks.append(peak.nbytes)
    medians = {f"{name}_seconds": statistics.median(times[1:]) for name, times in seconds.items()}
    return medians | {"step_bytes": max(peaks[1:])}


def main(
    steps: int = 20,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    large: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if large:
        print(json.dumps(step_of_large(large)))
        return
    console, found = Console(), {"embedded": learn(steps), "large": {}}
    for kind in KINDS:
        done = subprocess.run([sys.executable, __file__, "--large", kind], capture_output=True, text=True, check=True)
        found["large"][kind] = json.loads(done.stdout.splitlines()[-1])
    table = Table("", *KINDS, title=f"LoRA, {steps} steps")
    rows = copy.deepcopy(found["embedded"])
    for name in ("before", "after", "adapter_of_patched"):
        table.add_row(f"held-out loss {name}".replace("_", " "), *(f"{rows[kind][name]:.4f}" for kind in KINDS))
    for position, name in ((0, "first"), (-1, "last")):
        table.add_row(f"training loss, {name} step", *(f"{rows[kind]['steps'][position]:.4f}" for kind in KINDS))
    for name, unit, scale in (("forward_seconds", "s", 1), ("step_seconds", "s", 1), ("step_bytes", "MB", 1e-6)):
        cells = (f"{found['large'][kind][name] * scale:.3f}" for kind in KINDS)
        table.add_row(f"30B layers: {name.partition('_')[0]}, {unit}", *cells)
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
