"""The paper's figure 3: the swap pipeline against compute, on one clock.

    python benchmarks/figures/fig3_timeline.py [--model DIR] [--device cpu] [--out DIR]

A patched model reads one workload after another, a prompt and then a token a step, and follows the traffic from the
first tick on (`auto_pause=False`: this shows how moves happen, not whether they pay). Written are fig3_timeline.json,
a picture, and fig3_timeline.trace.json for Perfetto or chrome://tracing.

On a CPU a copy runs on the spot, inside the tick, which is inside the first layer's forward: nothing overlaps, and the
picture shows it. On CUDA, compute and copies are timed by events on their own streams, ticks on the host.
"""

import json
import statistics
from typing import Any

import figure_helpers as figures
import torch
import typer
from timeline import Timeline

from dynaexq import plots


def serve(timeline: Timeline, texts: dict[str, Any], prompt: int) -> None:
    """Every workload in turn: `[batch, T]` ids, `prompt` of them at once and then one a step."""
    for name, windows in texts.items():
        ids = torch.stack(windows)
        timeline.label = f"{name}, prompt"
        cache = timeline.model(ids[:, :prompt], use_cache=True).past_key_values
        timeline.label = f"{name}, token"
        for position in range(prompt, ids.shape[1]):
            timeline.model(ids[:, position : position + 1], past_key_values=cache)


def summary(spans: dict[str, list], moves: list[dict], slot_nbytes: int) -> dict[str, Any]:
    """What the timeline comes to; times in seconds, waits in microseconds."""
    promotions = [move for move in moves if move["promote"]]
    copying = sum(move["copy_end"] - move["copy_begin"] for move in promotions)
    inside = sum(
        max(0.0, min(move["copy_end"], end) - max(move["copy_begin"], begin))
        for move in promotions
        for _, begin, end in spans["tick"]
    )
    waits = [(move["published"] - move["decided"]) * 1e6 for move in promotions]
    return {
        "forwards": len(spans["forward"]),
        "ticks": len(spans["tick"]),
        "promotions": len(promotions),
        "demotions": len(moves) - len(promotions),
        "bytes_copied": len(promotions) * slot_nbytes,
        "forward_seconds": sum(end - begin for _, begin, end in spans["forward"]),
        "tick_seconds": sum(end - begin for _, begin, end in spans["tick"]),
        "copy_seconds": copying,
        "copying_inside_ticks": inside / copying if copying else None,
        "decided_to_published_microseconds": statistics.median(waits) if waits else None,
    }


def chrome_trace(spans: dict[str, list], moves: list[dict], on_cpu: bool) -> dict[str, Any]:
    """The timeline as Perfetto reads it. On a CPU there is one thread, and what runs inside what can be seen."""
    tracks = {"forward": 0, "layer": 0, "tick": 0 if on_cpu else 1, "copy": 0 if on_cpu else 2}
    names = ("the thread that computes",) if on_cpu else ("compute stream", "host", "copy stream")
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": track, "args": {"name": name}}
        for track, name in enumerate(names)
    ]
    for kind, found in {**spans, "copy": copies_of(moves)}.items():
        for name, begin, end in found:
            event = {"ph": "X", "cat": kind, "name": f"{kind} {name}", "pid": 0, "tid": tracks[kind]}
            events.append(event | {"ts": begin * 1e6, "dur": (end - begin) * 1e6})
    for index, move in enumerate(moves):  # moves overlap one another, so each is a track of its own
        event = {"cat": "move", "name": f"{'promote' if move['promote'] else 'demote'} {move['name']}", "id": index}
        for phase, moment in (("b", "decided"), ("e", "published")):
            events.append(event | {"ph": phase, "pid": 0, "tid": 0, "ts": move[moment] * 1e6})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def copies_of(moves: list[dict]) -> list[tuple[str, float, float]]:
    """Copies as spans: name, begin, end."""
    return [(move["name"], move["copy_begin"], move["copy_end"]) for move in moves if move["promote"]]


@torch.no_grad()
def main(
    model: figures.Model = figures.EMBEDDED,
    device: figures.Device = figures.DEVICE,
    text: figures.Texts = None,
    tiers: figures.Tiers = "int2,int4",
    upgraded: figures.Upgraded = 0.2,
    batch: int = 4,
    prompt: int = 64,
    steps: int = 32,
    update_interval: int = 4,
    threads: figures.Threads = 1,
    out: figures.Out = figures.RESULTS,
) -> None:
    """Record moves and compute on one clock."""
    torch.set_num_threads(threads)
    texts = figures.workloads(model, text, batch, prompt + steps, device)
    pair = tuple(tiers.split(","))
    followed = figures.patched(model, device, pair, upgraded, update_interval=update_interval, auto_pause=False)
    before = figures.machine(device)
    followed(next(iter(texts.values()))[0][None])  # kernels are compiled when they are first needed
    timeline = Timeline(followed)
    serve(timeline, texts, prompt)
    spans, moves = timeline.finish()
    totals = summary(spans, moves, timeline.slot_nbytes)
    options = {
        "tiers": pair,
        "upgraded": upgraded,
        "batch": batch,
        "prompt": prompt,
        "update_interval": update_interval,
    }
    results = {"machine": before, "model": model.name, **options, "summary": totals, "spans": spans, "moves": moves}
    figures.show(
        f"{model.name} on {before['device']}", [{"": name, "figure": value} for name, value in totals.items()]
    )
    title = f"swap pipeline against compute, on {before['device']}"
    figures.save(out, "fig3_timeline", results, lambda: plots.timeline(results["spans"], results["moves"]), title)
    trace = chrome_trace(spans, moves, on_cpu=device == "cpu")
    (out / "fig3_timeline.trace.json").write_text(json.dumps(trace) + "\n")


if __name__ == "__main__":
    typer.run(main)
