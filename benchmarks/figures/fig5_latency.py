"""The paper's figure 5: latency and throughput by batch size, in 16 bit, with a static and with a dynamic choice.

    python benchmarks/figures/fig5_latency.py [--model DIR] [--device cpu] [--batches 1,2,4,8,16,32] [--out DIR]

Three contestants read the same text, a prompt at once and then a token a step, the workload changing with every round:

- 16-bit: the unpatched model, with that of Transformers' implementations of the experts which a trial found fastest
  for the phase and the batch size. It is the baseline.
- static: patched, the choice of upgrades made at the start and kept (`policy="frozen"`).
- dynamic: patched, with control on, following from the first tick (`auto_pause=False`): what control costs at most.

They take turns request by request, in an order drawn for each round, so that what else the machine does meets all
alike. TTFT (the prompt), TPOT (a step) and tokens per second are medians over the rounds, P99 is that of all steps of
all rounds, ratios are medians of the ratios within a round. Where not all fit at once, leave some out with
--contestants.
"""

import random
import statistics
from pathlib import Path
from typing import Annotated, Any

import figure_helpers as figures
import numpy as np
import torch
import typer
from latency import Contestant, FastestImplementation
from torch import Tensor
from tqdm import tqdm

from dynaexq import plots

PANELS = {
    "ttft_ms": "TTFT, ms",
    "tpot_ms": "TPOT, ms",
    "p99_ms": "P99 of a step, ms",
    "tokens_per_second": "tokens per second",
}


def enter(names: list[str], path: Path, device: str, tiers: tuple[str, ...], share: float) -> dict[str, Contestant]:
    """The contestants of these names."""
    options: dict[str, dict[str, Any]] = {"static": {"policy": "frozen"}, "dynamic": {"auto_pause": False}}
    contestants = {}
    for name in names:
        if name == "16-bit":
            model = figures.original(path, device)
            contestants[name] = Contestant(model, FastestImplementation(model))
        elif name in options:
            contestants[name] = Contestant(figures.patched(path, device, tiers, share, **options[name]))
        else:
            raise typer.BadParameter(f"expected contestants of 16-bit, static, dynamic, got {name!r}")
    return contestants


def measure(
    contestants: dict[str, Contestant], texts: dict[str, list[Tensor]], batches: list[int], prompt: int, rounds: int
) -> None:
    """Fill `requests` of every contestant. A round before the first is not counted: it warms up."""
    streams, names, rng = list(texts.values()), list(contestants), random.Random(0)
    for batch in batches:
        for contestant in contestants.values():
            if isinstance(contestant.prepare, FastestImplementation):
                contestant.prepare.try_out(torch.stack(streams[0][:batch]), prompt)
    for turn in tqdm(range(-1, rounds), unit="round"):
        for batch in batches:
            ids = torch.stack(streams[turn % len(streams)][:batch])
            # Drawn anew: in a cycle each would always follow the same one, and find what that left in the caches.
            for name in rng.sample(names, len(names)):
                request = contestants[name].serve(ids, prompt)
                if turn >= 0:
                    contestants[name].requests.setdefault(batch, []).append(request)


def rows_of(contestants: dict[str, Contestant], batches: list[int]) -> list[dict[str, Any]]:
    """One row for each batch size and contestant; the first contestant is the baseline."""
    baseline, rows = next(iter(contestants)), []
    for batch in batches:
        rates = {
            name: [request.tokens_per_second(batch) for request in contestant.requests[batch]]
            for name, contestant in contestants.items()
        }
        for name, contestant in contestants.items():
            requests = contestant.requests[batch]
            quarters = np.quantile(np.divide(rates[name], rates[baseline]), (0.25, 0.5, 0.75))
            static = np.divide(rates[name], rates["static"]) if name == "dynamic" and "static" in rates else None
            steps = [step for request in requests for step in request.steps]
            rows.append(
                {
                    "contestant": name,
                    "batch": batch,
                    "ttft_ms": statistics.median(request.prompt for request in requests) * 1e3,
                    "tpot_ms": statistics.median(statistics.fmean(request.steps) for request in requests) * 1e3,
                    "p99_ms": float(np.quantile(steps, 0.99)) * 1e3,
                    "tokens_per_second": statistics.median(rates[name]),
                    f"times_{baseline}": float(quarters[1]),
                    "quartiles": f"{quarters[0]:.2f} to {quarters[2]:.2f}",
                    "times_static": None if static is None else float(np.median(static)),
                }
            )
    return rows


@torch.no_grad()
def main(
    model: figures.Model = figures.EMBEDDED,
    device: figures.Device = figures.DEVICE,
    text: figures.Texts = None,
    tiers: figures.Tiers = "int2,int4",
    upgraded: figures.Upgraded = 0.2,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16,32",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    steps: Annotated[int, typer.Option(help="Tokens after it.")] = 32,
    rounds: Annotated[int, typer.Option(help="Requests of each contestant at each batch size.")] = 12,
    contestants: Annotated[
        str, typer.Option(help="Who takes part; the first is the baseline.")
    ] = "16-bit,static,dynamic",
    threads: figures.Threads = 1,
    out: figures.Out = figures.RESULTS,
) -> None:
    """Measure latency and throughput."""
    torch.set_num_threads(threads)
    sizes, pair = [int(size) for size in batches.split(",")], tuple(tiers.split(","))
    texts = figures.workloads(model, text, max(sizes), prompt + steps, device)
    entered = enter(contestants.split(","), model, device, pair, upgraded)
    before = figures.machine(device)
    measure(entered, texts, sizes, prompt, rounds)
    rows = rows_of(entered, sizes)
    results = {
        "machine": before,
        "model": model.name,
        "tiers": pair,
        "upgraded": upgraded,
        "prompt": prompt,
        "steps": steps,
        "rounds": rounds,
        "promotions": {name: c.model.dynaexq.stats()["promotions"] for name, c in entered.items() if name != "16-bit"},
        "implementations": [
            {"phase": phase, "batch": batch, "fastest": chosen}
            for c in entered.values()
            if isinstance(c.prepare, FastestImplementation)
            for (phase, batch), chosen in c.prepare.chosen.items()
        ],
        "rows": rows,
    }
    figures.show(
        f"{model.name} on {before['device']}, {threads} threads; prompts of {prompt}, then {steps} tokens", rows
    )
    title = f"{model.name}, {' + '.join(pair)}, on {before['device']}"
    figures.save(out, "fig5_latency", results, lambda: plots.by_batch(rows, PANELS), title)


if __name__ == "__main__":
    typer.run(main)
