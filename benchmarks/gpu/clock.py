"""Time on a GPU, and on a CPU for a dry run: one way to wait, to capture and to count. It knows nothing of experts."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS, DRY_REPEATS = 30, 2  # a dry run's times mean nothing


def synchronize(device: torch.device) -> None:
    """Return when all that was queued on `device` has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replay_of(work: Callable[[], Any], device: torch.device) -> Callable[[], None] | None:
    """What replays `work` as a CUDA graph; None where it cannot be captured, or the device has no graphs."""
    if device.type != "cuda":
        return None
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        synchronize(device)
        return None
    return graph.replay


def duration(work: Callable[[], Any], device: torch.device) -> tuple[float, bool]:
    """Median microseconds of `work`, and whether it was captured in a graph."""
    with torch.no_grad():
        for _ in range(3):
            work()
        replay = replay_of(work, device)
        step = work if replay is None else replay
        step()
        repeats = REPEATS if device.type == "cuda" else DRY_REPEATS
        return statistics.median(step_times(step, repeats, device)[0]), replay is not None


def step_times(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[list[float], float]:
    """Microseconds of each of `steps`, sorted, and the seconds of all."""
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(steps):
            step()
            ends.append(time.perf_counter())
        return sorted((b - a) * 1e6 for a, b in itertools.pairwise(ends)), ends[-1] - ends[0]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    synchronize(device)
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    seconds = time.perf_counter() - start
    return sorted(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)), seconds


def allocations(device: torch.device) -> int:
    """How many times PyTorch has allocated device memory so far; 0 where nothing counts them."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])


def allocated_bytes(device: torch.device) -> int:
    """Bytes that tensors hold of the device now; 0 where nothing counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
