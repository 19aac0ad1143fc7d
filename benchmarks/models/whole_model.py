"""A whole model on the CPU beside what people would use instead: decoding, prefill, and where a token's time goes.

    python benchmarks/models/whole_model.py [--layers 4] [--threads 2] [--rounds 3] [--json FILE]
        [--llama BIN --gguf MODEL-Q4_0.gguf,MODEL-Q4_K_M.gguf]

A Qwen3-MoE of the layer shapes of Qwen3-30B-A3B with random weights: 128 experts, vocabulary 32,768. Contestants take
turns, round by round, and figures are medians over the rounds. Decoding is `generate()`, greedy, by the clock between
its tokens, after a prompt of 32 and, for one sequence, after longer ones; prefill is one forward that keeps no logits
but the last. Compiled means a static cache and `torch.compile` for every token after the prompt, with the seconds that
it takes. Bytes per token are the weights that one token's matrices read, and the limit is what this machine reads of
them per second, measured first. Parts of a token are timed by hooks, which have layers go module by module.

For llama.cpp give the directory of its programs, `llama-bench` and `llama-batched-bench`, and GGUF files of the same
shape; `--write-gguf FILE` makes one in 16 bit, for `llama-quantize` (needs the package gguf).
"""

import copy
import csv
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.generation.streamers import BaseStreamer

import dynaexq
from dynaexq.memory.device_memory import measure_bandwidth
from dynaexq.runtime.linear import PackedLinear

PROMPT, NEW_TOKENS = 32, 24
BATCHES, PREFILLS = (1, 4, 16), (512, 2048)
CONTEXTS = (1024, 4096)
"""Tokens before those that one sequence is decoded behind, besides `PROMPT`."""
UPGRADED_SHARE = 0.2


class Contestant(NamedTuple):
    """How the model is patched, if it is, and whether its decoding is compiled."""

    options: dict[str, Any] | None = None
    compiled: bool = False


CONTESTANTS = {
    "transformers bf16": Contestant(),
    "transformers bf16, compiled": Contestant(compiled=True),
    "int4": Contestant({"tiers": ("int4",)}),
    "int4, dense int8": Contestant({"tiers": ("int4",), "dense": "int8"}),
    "int4, dense int8, compiled": Contestant({"tiers": ("int4",), "dense": "int8"}, compiled=True),
    "int4, dense int4": Contestant({"tiers": ("int4",), "dense": "int4"}),
    "int4, dense int4, compiled": Contestant({"tiers": ("int4",), "dense": "int4"}, compiled=True),
    "int2+int4, dense int4": Contestant({"tiers": ("int2", "int4"), "dense": "int4"}),
}
SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 8192,
}

Figures = dict[str, dict[str, list[float]]]
"""Tokens per second by contestant and by what was measured, one of each round."""


def random_model(layers: int) -> PreTrainedModel:
    """The model in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=layers, **SIZES)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def built(model: PreTrainedModel, options: dict[str, Any] | None) -> PreTrainedModel:
    """`model` itself, or a copy patched with `options`, a fifth of its experts upgraded where there is an upgrade."""
    if options is None:
        return model
    model = copy.deepcopy(model)
    runtime = dynaexq.patch(model, "1TiB", device="cpu", config={"quantizer": "rtn", **options})
    slots, upgrade = runtime.plan.num_slots, runtime.plan.upgrade
    if upgrade is not None:
        runtime.set_budget(runtime.memory()["total"] - round((1 - UPGRADED_SHARE) * slots) * upgrade.nbytes)
    return model


class Clock(BaseStreamer):
    """The seconds between the tokens that `generate` gives out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def seconds(self) -> float:
        """The median after the prompt and the first token."""
        return statistics.median(np.diff(self.times[1:]).tolist())


def compiling() -> dict[str, Any]:
    """What `generate` is told, to compile decoding on a CPU as it does on a GPU."""
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def decode(model: PreTrainedModel, batch: int, compiled: bool = False, length: int = PROMPT) -> float:
    """Tokens per second of `generate` behind a prompt of `length`, of all rows of the batch together."""
    ids, clock = torch.arange(batch * length).view(batch, length) * 7 % SIZES["vocab_size"], Clock()
    step = model.prepare_inputs_for_generation

    def timed(*args: Any, **kwargs: Any) -> Any:  # streamers take one row only
        clock.put(ids)
        return step(*args, **kwargs)

    model.prepare_inputs_for_generation = timed
    try:
        limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        model.generate(ids, do_sample=False, **limits, **(compiling() if compiled else {}))
    finally:
        del model.prepare_inputs_for_generation
    return batch / clock.seconds


def prefill(model: PreTrainedModel, length: int) -> float:
    ids = torch.arange(length)[None] * 7 % SIZES["vocab_size"]
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return length / (time.perf_counter() - start)


def warm_up(model: PreTrainedModel, compiled: bool) -> float:
    """Seconds until everything has run once, and what is compiled is compiled."""
    start = time.perf_counter()
    for batch in BATCHES if compiled else BATCHES[:1]:
        decode(model, batch, compiled)
    return time.perf_counter() - start


def race(models: dict[str, PreTrainedModel], llama: Callable[[], Figures], rounds: int) -> Figures:
    """Tokens per second of all, in turns."""
    found: Figures = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for name, model in models.items():
            compiled = CONTESTANTS[name].compiled
            for batch in BATCHES:
                found[name][f"decode {batch}"].append(decode(model, batch, compiled))
            if compiled:
                continue  # a prompt is not, and a context as long as the cache takes as long as a short one
            for length in CONTEXTS:
                found[name][f"decode behind {length}"].append(decode(model, 1, length=length))
            for length in PREFILLS:
                found[name][f"prefill {length}"].append(prefill(model, length))
        for name, figures in llama().items():
            for what, speeds in figures.items():
                found[name][what] += speeds
    return found


def llama_cpp(programs: Path, gguf: Path, threads: int) -> dict[str, list[float]]:
    """The same of llama.cpp, by its own benchmarks."""
    found: dict[str, list[float]] = {}
    lengths = ",".join(map(str, PREFILLS))
    command = [programs / "llama-bench", "-m", gguf, "-t", str(threads), "-p", lengths, "-n", "0", "-r", "1"]
    for row in csv.DictReader(io.StringIO(_said([*command, "-o", "csv"]))):
        found[f"prefill {row['n_prompt']}"] = [float(row["avg_ts"])]
    depths = ",".join(map(str, CONTEXTS))
    command = [programs / "llama-bench", "-m", gguf, "-t", str(threads), "-p", "0", "-n", str(NEW_TOKENS), "-r", "1"]
    for row in csv.DictReader(io.StringIO(_said([*command, "-d", depths, "-o", "csv"]))):
        found[f"decode behind {row['n_depth']}"] = [float(row["avg_ts"])]
    command = [programs / "llama-batched-bench", "-m", gguf, "-t", str(threads), "-tb", str(threads), "-c", "2048"]
    batches = ",".join(map(str, BATCHES))
    lines = _said([*command, "-npp", str(PROMPT), "-ntg", str(NEW_TOKENS), "-npl", batches]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for row in rows:
        if row[0] == str(PROMPT):
            found[f"decode {row[2]}"] = [float(row[7])]
    return found


def _said(command: list[Any]) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def bytes_per_token(model: PreTrainedModel) -> dict[str, int]:
    """Weights that the matrices of one token read."""
    config, found = model.config, {"dense": 0, "experts": 0}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            found["dense"] += module.packed.nbytes
        elif isinstance(module, nn.Linear):
            found["dense"] += module.weight.nbytes
    chosen = config.num_experts_per_tok * config.num_hidden_layers
    runtime = getattr(model, "dynaexq", None)
    if runtime is None:
        weights = 3 * config.hidden_size * config.moe_intermediate_size
        return found | {"experts": chosen * weights * model.dtype.itemsize}
    plan = runtime.plan
    upgrade = UPGRADED_SHARE * plan.upgrade.nbytes if plan.upgrade else 0
    return found | {"experts": round(chosen * (plan.base.nbytes + upgrade))}


def bandwidth(threads: int) -> float:
    """Bytes read per second by so many threads."""
    torch.set_num_threads(threads)
    return measure_bandwidth(torch.device("cpu"))


@contextmanager
def timed_parts(model: PreTrainedModel) -> Iterator[dict[str, float]]:
    """Seconds by part of the model, of the forwards inside."""
    spent: dict[str, float] = defaultdict(float)
    handles, started = [], {}

    def watch(part: str, module: nn.Module) -> None:
        def before(*_: Any) -> None:
            started[module] = time.perf_counter()

        def after(*_: Any) -> None:
            spent[part] += time.perf_counter() - started[module]

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            watch("attention, linear layers", getattr(layer.self_attn, name))
        watch("attention", layer.self_attn)
        watch("router", layer.mlp.gate)
        watch("experts", layer.mlp.experts)
    watch("lm_head", model.lm_head)
    watch("all", model)
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def profile(model: PreTrainedModel) -> dict[str, float]:
    """Milliseconds of one decoded token by part, batch 1."""
    ids = torch.arange(PROMPT)[None]
    output = model(ids, use_cache=True)
    steps = 16
    with timed_parts(model) as spent:
        for _ in range(steps):
            output = model(ids[:, :1], past_key_values=output.past_key_values)
    found = {part: 1e3 * seconds / steps for part, seconds in spent.items()}
    found["attention, rest"] = found.pop("attention") - found["attention, linear layers"]
    found["rest"] = 2 * found["all"] - sum(found.values())
    return found


def write_gguf(path: Path, layers: int) -> None:
    """A file of the same shape for llama.cpp, in 16 bit, with random weights."""
    from gguf import GGUFWriter

    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16)

    hidden, inner, experts = SIZES["hidden_size"], SIZES["moe_intermediate_size"], SIZES["num_experts"]
    heads, groups, width = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(SIZES["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(1)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", weight(SIZES["vocab_size"], hidden))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        tensors = {
            "attn_norm": np.ones(hidden, np.float32),
            "ffn_norm": np.ones(hidden, np.float32),
            "attn_q_norm": np.ones(width, np.float32),
            "attn_k_norm": np.ones(width, np.float32),
            "attn_q": weight(heads * width, hidden),
            "attn_k": weight(groups * width, hidden),
            "attn_v": weight(groups * width, hidden),
            "attn_output": weight(hidden, heads * width),
            "ffn_gate_inp": weight(experts, hidden).astype(np.float32),
            "ffn_gate_exps": weight(experts, inner, hidden),
            "ffn_up_exps": weight(experts, inner, hidden),
            "ffn_down_exps": weight(experts, hidden, inner),
        }
        for name, tensor in tensors.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def show(result: dict[str, Any]) -> None:
    console = Console(width=140)
    names = [f"decode {batch}" for batch in BATCHES] + [f"decode behind {length}" for length in CONTEXTS]
    names += [f"prefill {length}" for length in PREFILLS]
    table = Table("tokens/s", *names, "MB per token", "GB/s", "s to warm up")
    for name, speeds in result["tokens_per_second"].items():
        nbytes = sum(result["bytes_per_token"].get(name, {}).values())
        rate = f"{nbytes * speeds['decode 1'] / 1e9:.1f}" if nbytes else ""
        cells = (f"{speeds[what]:.1f}" if what in speeds else "" for what in names)
        warm = result["seconds_to_warm_up"].get(name)
        table.add_row(
            name, *cells, f"{nbytes / 1e6:.0f}" if nbytes else "", rate, "" if warm is None else f"{warm:.0f}"
        )
    console.print(table, f"memory: {result['bandwidth'] / 1e9:.1f} GB/s")
    parts = next(iter(result["milliseconds"].values()))
    table = Table("ms of a token", *parts)
    for name, spent in result["milliseconds"].items():
        table.add_row(name, *(f"{spent[part]:.2f}" for part in parts))
    console.print(table)


@torch.no_grad()
def main(
    layers: int = 4,
    threads: int = 2,
    rounds: int = 3,
    only: Annotated[str, typer.Option(help="Contestants, separated by semicolons; all of them if empty.")] = "",
    llama: Annotated[Path | None, typer.Option(help="Directory of llama.cpp's programs.")] = None,
    gguf: Annotated[str, typer.Option(help="Files for them, separated by commas.")] = "",
    gguf_path: Annotated[Path | None, typer.Option("--write-gguf", help="Write a GGUF in 16 bit, and end.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if gguf_path is not None:
        write_gguf(gguf_path, layers)
        return
    rate = bandwidth(threads)
    model = random_model(layers)
    chosen = only.split(";") if only else list(CONTESTANTS)
    patched = {repr(CONTESTANTS[name].options): CONTESTANTS[name].options for name in chosen}
    patched = {key: built(model, options) for key, options in patched.items()}
    models = {name: patched[repr(CONTESTANTS[name].options)] for name in chosen}
    del model, patched

    def theirs() -> Figures:
        files = [Path(name) for name in gguf.split(",") if name]
        return {f"llama.cpp {file.stem}": llama_cpp(llama, file, threads) for file in files} if llama else {}

    seconds = {name: warm_up(model, CONTESTANTS[name].compiled) for name, model in models.items()}
    figures = race(models, theirs, rounds)
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "layers": layers,
        "bandwidth": rate,
        "tokens_per_second": {
            name: {what: statistics.median(speeds) for what, speeds in by.items()} for name, by in figures.items()
        },
        "bytes_per_token": {name: bytes_per_token(model) for name, model in models.items()},
        "seconds_to_warm_up": seconds,
        "milliseconds": {name: profile(model) for name, model in models.items() if not CONTESTANTS[name].compiled},
    }
    show(result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
