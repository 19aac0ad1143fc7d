"""The paper's figure 4: perplexity against the share of experts at the low precision, demoted coldest first.

    python benchmarks/figures/fig4_perplexity.py [--model DIR] [--device cpu] [--tiers int2,int4 ...] [--out DIR]

The order is the paper's, by hotness, and ours beside it, by hotness times the error that the upgrade removes; a random
one is what either must beat. Experts of all layers compete. Hotness comes from the first half of every workload,
perplexity and the KL divergence from the model in its own dtype from the second half. The low precision is the base of
a pair of tiers, the high one its upgrade.
"""

from pathlib import Path
from typing import Annotated

import figure_helpers as figures
import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from dynaexq import plots
from dynaexq.evaluate import evaluate, reference_logits, stream_logits

SHARES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
ORDERS = ("hotness", "hotness x error", "random")


class Pair:
    """The model with every expert upgraded, whose coldest are then demoted.

    Args:
        hotness: windows to count routing on.
    """

    def __init__(self, path: Path, device: str, tiers: tuple[str, ...], hotness: list[Tensor]):
        self._wanted: np.ndarray | None = None

        def as_told(score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
            return upgraded if self._wanted is None else self._wanted

        self.model = figures.patched(path, device, tiers, 1.0, policy=as_told)
        self._runtime = self.model.dynaexq
        self._memory = self._runtime.memory()
        self._slot = self._memory["upgrade"] // self._runtime.plan.num_slots
        for _ in stream_logits(self.model, hotness):
            pass
        mass = self._runtime.routed_mass()
        gain = self._runtime.devices[0].control.controller.gain
        scattered = np.random.default_rng(0).random(mass.shape)
        self.orders = dict(zip(ORDERS, (mass, mass * gain, scattered), strict=True))

    def demote(self, order: str, share: float) -> int:
        """Leave the upgrade only to those that come last in `order`; returns the bytes of all experts then."""
        worth = self.orders[order]
        kept = worth.size - round(share * worth.size)
        wanted = np.zeros(worth.size, dtype=bool)
        wanted[np.argsort(-worth, axis=None, kind="stable")[:kept]] = True
        self._wanted = None
        self._runtime.set_budget(self._memory["total"] - self._memory["upgrade"] + kept * self._slot)
        self._wanted = wanted.reshape(worth.shape)
        while not np.array_equal(self._upgraded(), self._wanted):
            before = self._runtime.stats()["promotions"]
            self._runtime.tick()
            self._runtime.drain()
            if self._runtime.stats()["promotions"] == before:
                raise RuntimeError("expected the upgrades that were asked for, some could not be copied; see the log")
        memory = self._runtime.memory()
        return memory["base"] + memory["upgrade"]

    def _upgraded(self) -> np.ndarray:
        return self._runtime.tiers() > self._runtime.plan.base.bits


def rows_of(pair: Pair, windows: list[Tensor], reference: list[Tensor], shares: list[float]) -> list[dict]:
    """One row for each order and share; where all or none are demoted the order does not matter."""
    rows = []
    with tqdm(total=len(ORDERS) * len(shares), unit="point") as progress:
        for order in ORDERS:
            for share in shares:
                known = [row for row in rows if row["low"] == share and share in (0.0, 1.0)]
                if known:
                    rows.append(known[0] | {"order": order})
                else:
                    nbytes = pair.demote(order, share)
                    found = evaluate(pair.model, windows, reference)
                    quality = {"perplexity": found.perplexity, "kl": found.kl}
                    rows.append({"order": order, "low": share, "bytes": nbytes, **quality})
                progress.update()
    return rows


def main(
    model: figures.Model = figures.EMBEDDED,
    device: figures.Device = figures.DEVICE,
    text: figures.Texts = None,
    pair: Annotated[list[str] | None, typer.Option("--tiers", help="base,upgrade; may be repeated.")] = None,
    shares: Annotated[str, typer.Option(help="Shares demoted.")] = ",".join(map(str, SHARES)),
    windows: Annotated[int, typer.Option(help="Windows of a workload to measure, and as many for hotness.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 128,
    threads: figures.Threads = 1,
    out: figures.Out = figures.RESULTS,
) -> None:
    """Measure quality against the share of experts at the low precision."""
    torch.set_num_threads(threads)
    texts = figures.workloads(model, text, 2 * windows, length, device)
    hotness = [window for found in texts.values() for window in found[:windows]]
    measured = [window for found in texts.values() for window in found[windows:]]
    unpatched = figures.original(model, device)
    reference, exact = reference_logits(unpatched, measured), evaluate(unpatched, measured)
    del unpatched
    points, pairs = sorted(float(share) for share in shares.split(",")), []
    for tiers in pair or ["int2,int4", "int4,fp16"]:
        rows = rows_of(Pair(model, device, tuple(tiers.split(",")), hotness), measured, reference, points)
        pairs.append({"tiers": tiers.split(","), "rows": rows})
        figures.show(f"{model.name}: {tiers.replace(',', ' refined to ')}; unpatched {exact.perplexity:.4f}", rows)
    results = {
        "machine": figures.machine(device),
        "model": model.name,
        "workloads": list(texts),
        "tokens": len(measured) * length,
        "perplexity": exact.perplexity,
        "pairs": pairs,
    }
    figures.save(out, "fig4_perplexity", results, lambda: plots.quality_by_share(pairs, exact.perplexity), model.name)


if __name__ == "__main__":
    typer.run(main)
