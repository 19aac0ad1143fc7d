"""A whole model on a GPU: prompts and tokens, eager and from a graph, while precision stands still and while it moves.

The model has the shape of Qwen3-30B-A3B and random weights; a few random experts are quantized and serve as all of
them, so that no 16-bit expert is ever held but these. *Static* is frozen; *dynamic* demotes and promotes all the time,
as much as the traffic limit allows, wherever the traffic goes: the worst case. A token is a forward of one position a
sequence that keeps no cache, so attention costs next to nothing, to all contestants alike.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

from dynaexq.hf.answers import ANSWERS
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.hf.model_patch import ModelPatch
from dynaexq.hf.planning import inspect_model, make_codec, plan
from dynaexq.hf.quantizer import DynaExqQuantizer
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.runtime import Runtime
from dynaexq.settings import Settings
from dynaexq.weights.quantize_experts import open_store
from dynaexq.weights.sources import LoadResult

QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
TIERS = (("int2", "int4"), ("int4", "int8"))
UPGRADED, DIFFERENT_EXPERTS, TICK_EVERY, TRACED_STEPS = 0.2, 16, 4, 24


@dataclass(frozen=True)
class Workload:
    """What is run: `batches` of one token a sequence, and `prompts` of so many tokens."""

    device: torch.device
    num_layers: int
    steps: int
    shape: dict[str, Any]
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (512, 2048)


class RepeatedLoader:
    """A few random experts, quantized once, in the place of all."""

    def place(self, codec: ExpertCodec, base: Tensor, settings: Settings) -> LoadResult:
        """See `sources.ExpertLoader`."""
        shape, (num_layers, num_experts, _) = codec.shape, base.shape
        up, down = (
            torch.empty(DIFFERENT_EXPERTS, *size, dtype=codec.dtype, device=base.device).normal_(0, 0.02)
            for size in ((shape.up_rows, shape.hidden_size), (shape.hidden_size, shape.intermediate_size))
        )
        encoded = codec.encode(ExpertWeights(up, down))
        assert encoded.upgrade is not None, "a pair of two"
        which = torch.arange(num_experts) % DIFFERENT_EXPERTS
        store = open_store(num_layers * num_experts, codec.upgrade_layout.nbytes, settings.host_copy)
        upgrades = encoded.upgrade.cpu()[which]
        for layer in range(num_layers):
            base[layer] = encoded.base[which.to(base.device)]
            store.write(layer * num_experts, upgrades)
        return LoadResult(np.broadcast_to(encoded.errors[which], (num_layers, num_experts, 2)).copy(), store)


class Rotation:
    """A policy that wants a window of experts which moves on at every tick, or stands still."""

    def __init__(self) -> None:
        self.moving, self._start = False, 0

    def __call__(self, score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
        if not self.moving:
            return upgraded
        self._start = (self._start + max(1, slots // 16)) % score.size
        wanted = np.zeros(score.size, dtype=bool)
        wanted[(self._start + np.arange(slots)) % score.size] = True
        return wanted.reshape(score.shape)


def build(workload: Workload, tiers: tuple[str, ...], policy: Rotation) -> PreTrainedModel:
    """A patched random model on the device, a fifth of its experts upgraded."""
    shape = Qwen3MoeConfig(**workload.shape, num_hidden_layers=workload.num_layers)
    with torch.device(workload.device), patch.object(modeling_qwen3_moe, "Qwen3MoeExperts", _MetaExperts):
        model = Qwen3MoeForCausalLM._from_config(shape, dtype=torch.bfloat16).eval().requires_grad_(False)
    options = {"tiers": tiers, "device": str(workload.device), "policy": policy, "update_interval": TICK_EVERY}
    config = DynaExqConfig(hbm_budget=2**50, quantizer="rtn", **options)
    settings, layers = config.settings(), find_sparse_layers(model, on_meta=True)
    planned = plan(inspect_model(model, layers, settings), settings, workload.device)
    planned = replace(planned, num_slots=int(UPGRADED * planned.num_layers * planned.num_experts))
    planned = replace(planned, budget=planned.total)
    codec = make_codec(layers[0], tiers, settings)
    loaded = DeviceRuntime(model, planned, codec, settings, workload.device, RepeatedLoader())
    changes = ModelPatch(model, layers)
    changes.replace_modules()
    changes.connect(loaded, layers)
    changes.attach(Runtime(model, [(loaded, range(len(layers)))]), DynaExqQuantizer(config), ANSWERS)
    return model


class _MetaExperts(modeling_qwen3_moe.Qwen3MoeExperts):
    """Experts with shapes and no bytes."""

    def __init__(self, config: Any):
        with torch.device("meta"):
            super().__init__(config)


class Contestant:
    """A forward of fixed shape, eager or replayed."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, graph: bool):
        self._model, self._ids, self._graph = model, ids, None
        for _ in range(3):
            self._forward()
        if graph:
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self._forward()
            self._graph = captured

    def step(self) -> None:
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()

    @torch.no_grad()
    def _forward(self) -> None:
        self._model(self._ids, use_cache=False, logits_to_keep=1)


def step_times(step: Callable[[], None], steps: int, device: torch.device) -> tuple[list[float], float]:
    """Microseconds of each of `steps`, sorted, and the seconds of all."""
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(steps):
            step()
            ends.append(time.perf_counter())
        return sorted((b - a) * 1e6 for a, b in itertools.pairwise(ends)), ends[-1] - ends[0]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return sorted(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)), seconds


def measure(model: PreTrainedModel, policy: Rotation, ids: Tensor, workload: Workload) -> Iterable[dict[str, Any]]:
    """Static and dynamic, eager and, where there are graphs, replayed."""
    runtime, steps = model.dynaexq, workload.steps if ids.shape[1] == 1 else max(3, workload.steps // 20)
    for graph in (False, True)[: 1 + (workload.device.type == "cuda")]:
        contestant = Contestant(model, ids, graph)
        for policy.moving in (False, True):
            runtime.drain()  # what was begun before is not this one's
            before = runtime.stats()["bytes_copied"]
            times, seconds = step_times(contestant.step, steps, workload.device)
            copied = runtime.stats()["bytes_copied"] - before
            yield {
                "pair": "+".join(runtime.plan.tiers),
                "what": "token" if ids.shape[1] == 1 else "prompt",
                "sequences": ids.shape[0],
                "positions": ids.shape[1],
                "run": "graph" if graph else "eager",
                "precision": "dynamic" if policy.moving else "static",
                "tokens_a_second": steps * ids.numel() / seconds,
                "median_microseconds": statistics.median(times),
                "p99_microseconds": times[int(0.99 * len(times))],
                "megabytes_a_second_copied": copied / seconds / 1e6,
            }
        policy.moving = False


def trace(model: PreTrainedModel, policy: Rotation, ids: Tensor, workload: Workload, path: Path) -> dict[str, Any]:
    """Profile a few dynamic steps to a Chrome trace, and say how much of the copying kernels ran beside."""
    on_gpu = workload.device.type == "cuda"
    contestant = Contestant(model, ids, graph=on_gpu)
    policy.moving = True
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(TRACED_STEPS):
            contestant.step()
        if on_gpu:
            torch.cuda.synchronize()
    policy.moving = False
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return {"trace": path.name, **overlap(json.loads(path.read_text())["traceEvents"])}


def overlap(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of copies to the device in a Chrome trace, and the share of them during which a kernel ran."""
    copies = _union(e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"])
    kernels = _union(e for e in events if e.get("cat") == "kernel")
    total = sum(end - start for start, end in copies)
    shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in copies for b in kernels)
    return {"copy_milliseconds": total / 1e3, "beside_kernels": shared / total if total else None}


def _union(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """The time that `events` cover, as disjoint intervals in microseconds."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def run(workload: Workload, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every pair, batch and prompt; the trace is of the first pair's first batch."""
    found: dict[str, list[dict[str, Any]]] = {"model": [], "overlap": []}
    vocabulary = workload.shape["vocab_size"]
    for tiers in TIERS:
        policy = Rotation()
        model = build(workload, tiers, policy)
        for size in [(batch, 1) for batch in workload.batches] + [(1, prompt) for prompt in workload.prompts]:
            ids = torch.randint(vocabulary, size, device=workload.device)
            found["model"] += measure(model, policy, ids, workload)
        if not found["overlap"]:
            ids = torch.randint(vocabulary, (workload.batches[0], 1), device=workload.device)
            found["overlap"].append(trace(model, policy, ids, workload, out / "gpu-overlap-trace.json"))
        model.dynaexq.close()
        del model
    return found
