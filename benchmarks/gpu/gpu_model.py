"""A whole model on a GPU: prompts and tokens, eager and from a graph, while precision stands still and while it moves.

*Static* is frozen; *dynamic* demotes and promotes all the time, as much as the traffic limit allows, wherever the
traffic goes: the worst case. A token is a forward of one position a sequence that keeps no cache, so attention costs
next to nothing, to all contestants alike; `gpu_generate.py` has caches.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import replay_of, step_times, synchronize
from random_model import Rotation, build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

TIERS = (("int2", "int4"), ("int4", "int8"))
TRACED_STEPS = 24


@dataclass(frozen=True)
class Workload:
    """What is run: `batches` of one token a sequence, and `prompts` of so many tokens, by a model of these sizes."""

    device: torch.device
    steps: int
    sizes: dict[str, Any]
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (512, 2048)


def forward_over(model: PreTrainedModel, ids: Tensor, graph: bool) -> Callable[[], object]:
    """A forward over `ids`, eager or replayed.

    Raises:
        RuntimeError: it was to be captured, and cannot be.
    """

    @torch.no_grad()
    def forward() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    for _ in range(3):
        forward()
    if not graph:
        return forward
    replay = replay_of(forward, ids.device)
    if replay is None:
        raise RuntimeError(f"expected a forward over {list(ids.shape)} tokens to be captured as a CUDA graph")
    return replay


def measure(model: PreTrainedModel, policy: Rotation, ids: Tensor, workload: Workload) -> Iterable[dict[str, Any]]:
    """Static and dynamic, eager and, where there are graphs, replayed."""
    runtime, steps = model.dynaexq, workload.steps if ids.shape[1] == 1 else max(3, workload.steps // 20)
    for graph in (False, True)[: 1 + (workload.device.type == "cuda")]:
        forward = forward_over(model, ids, graph)
        for policy.moving in (False, True):
            runtime.drain()  # what was begun before is not this one's
            before = runtime.stats()["bytes_copied"]
            times, seconds = step_times(forward, steps, workload.device)
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
    forward = forward_over(model, ids, graph=on_gpu)
    policy.moving = True
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(TRACED_STEPS):
            forward()
        synchronize(workload.device)
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


def run(workload: Workload, out: Path) -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
    """Every pair, batch and prompt: titles, and rows below them; the trace is of the first pair's first batch."""
    vocabulary = workload.sizes["vocab_size"]
    for tiers in TIERS:
        policy = Rotation()
        model = build(workload.sizes, tiers, policy, workload.device)
        for size in [(batch, 1) for batch in workload.batches] + [(1, prompt) for prompt in workload.prompts]:
            ids = torch.randint(vocabulary, size, device=workload.device)
            yield "model", measure(model, policy, ids, workload)
        if tiers == TIERS[0]:
            ids = torch.randint(vocabulary, (workload.batches[0], 1), device=workload.device)
            yield "overlap", [trace(model, policy, ids, workload, out / "gpu-overlap-trace.json")]
        model.dynaexq.close()
        del model
