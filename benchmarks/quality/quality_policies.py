"""Who gets the upgrades: the contestants of benchmarks/quality/quality.py, from none to an oracle."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from streams import Hotness, Outcome, Stream
from tqdm import tqdm

import dynaexq
from dynaexq.policy import top_n
from dynaexq.settings import Settings

PAPER_ALPHAS = (0.5, 0.8, 0.9, 0.95)
PAPER_DELTAS = (0.0, 0.01, 0.03)
Row = dict[str, Any]


class PaperRule:
    """The paper's: per layer, the hottest outsider replaces the coldest incumbent while it is hotter by `delta`.

    It ranks by hotness alone, and each layer has the same number of slots. The hotness is the runtime's, with the
    paper's `alpha` a step.
    """

    def __init__(self, delta: float):
        self.delta = delta
        self.runtime: dynaexq.Runtime | None = None

    def __call__(self, score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
        assert self.runtime is not None, "the runtime is made known before the first forward"
        hotness, num_layers = self.runtime.hotness(), len(score)
        shares = slots // num_layers + (np.arange(num_layers) < slots % num_layers)
        return np.stack([self._layer(*row) for row in zip(hotness, upgraded, shares, strict=True)])

    def _layer(self, hotness: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
        order = np.argsort(-hotness, kind="stable")
        outsiders, incumbents = list(order[~upgraded[order]]), list(order[upgraded[order]])
        chosen = incumbents[:slots]
        chosen += outsiders[: slots - len(chosen)]
        newcomers = [expert for expert in outsiders if expert not in chosen]
        for newcomer in newcomers:
            coldest = min(chosen, key=lambda expert: hotness[expert])
            if not hotness[newcomer] - hotness[coldest] > self.delta:
                break
            chosen[chosen.index(coldest)] = newcomer
        wanted = np.zeros_like(upgraded)
        wanted[chosen] = True
        return wanted


class HotnessAlone:
    """dynaexq's own rule without the gain: who is hot, whatever error an upgrade removes."""

    hysteresis = Settings().hysteresis

    def __init__(self) -> None:
        self.runtime: dynaexq.Runtime | None = None

    def __call__(self, score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
        assert self.runtime is not None, "the runtime is made known before the first forward"
        hotness = self.runtime.devices[0].control.tracker.expected.reshape(1, -1)
        return top_n(hotness, upgraded.reshape(1, -1), np.array([slots]), self.hysteresis).reshape(score.shape)


@dataclass(frozen=True)
class Contest:
    """One pair and one share of upgraded experts. All start from the calibrated hotness; only the oracle foresees.

    Attributes:
        common: options of every contestant.
    """

    stream: Stream
    tiers: tuple[str, str]
    share: float
    hotness: Hotness
    common: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, warm: bool = True, **options: Any) -> Row:
        """Start from the calibrated hotness, unless not `warm`, then let `options` decide."""
        model, runtime = self.stream.patched(self.share, tiers=self.tiers, **self.common | options)
        if isinstance(options.get("policy"), PaperRule | HotnessAlone):
            options["policy"].runtime = runtime
        if warm:
            runtime.warm_start(self.hotness.calibrated)
        return self._row(name, self.stream.send(model, runtime), runtime)

    def oracle(self) -> Row:
        """At the start of each phase, the best set for that phase's average traffic; its moves cost nothing."""
        model, runtime = self.stream.patched(self.share, tiers=self.tiers, policy="frozen", **self.common)
        outcome = self.stream.send(model, runtime, lambda index: runtime.warm_start(self.hotness.foreseen[index]))
        return self._row("oracle of each phase", outcome, runtime) | {"moves": None, "bytes moved": None}

    def paper(self, alpha: float, delta: float) -> Row:
        """The paper's second rule, top-n with hysteresis."""
        name = f"paper, top-n, alpha {alpha:g}, delta {delta:g}"
        return self.run(name, policy=PaperRule(delta), allocation="per_layer", alpha=alpha)

    def threshold(self, alpha: float) -> Row:
        """The paper's first rule: what the calibrated choice let in comes in, half of that may stay."""
        tau = float(np.quantile(self.hotness.calibrated, 1 - self.share))
        name = f"paper, thresholds, alpha {alpha:g}"
        return self.run(name, policy="threshold", tau_h=tau, tau_c=tau / 2, allocation="per_layer", alpha=alpha)

    def _row(self, name: str, outcome: Outcome, runtime: dynaexq.Runtime) -> Row:
        stats = outcome.stats
        return {
            "policy": name,
            "KL": outcome.mean_kl,
            "perplexity": float(np.exp(np.mean(outcome.loss))),
            "coverage": stats["hot_coverage"],
            "moves": stats["promotions"],
            "bytes moved": stats["bytes_copied"],
            "KL by phase": outcome.kl,
        }


def bounds(contest: Contest) -> tuple[Row, Row]:
    """No expert upgraded, and every one."""
    low, high = (replace(contest, share=share) for share in (0.0, 1.0))
    return low.run("all low", policy="frozen"), high.run("all high", policy="frozen")


def contestants(contest: Contest, sweep: bool) -> Iterator[Callable[[], Row]]:
    """Everybody between the bounds; with `sweep`, the paper's rules at all settings, not only at their best."""
    yield lambda: contest.run("frozen calibrated map", policy="frozen")
    alphas, deltas = (PAPER_ALPHAS, PAPER_DELTAS) if sweep else ((0.5,), (0.01,))
    for alpha in alphas:
        for delta in deltas:
            yield lambda alpha=alpha, delta=delta: contest.paper(alpha, delta)
    for alpha in alphas if sweep else (0.5,):
        yield lambda alpha=alpha: contest.threshold(alpha)
    yield lambda: contest.run("dynaexq")
    yield contest.oracle


def compete(contest: Contest, low: Row, high: Row, sweep: bool = False) -> list[Row]:
    """Every policy's row, with two shares: of the KL between low and high, and between frozen map and oracle."""
    between = list(contestants(contest, sweep))
    name = f"{' < '.join(contest.tiers)}, {contest.share:.0%}"
    rows = [low, *(run() for run in tqdm(between, desc=name, unit="policy")), high]
    by_name = {row["policy"]: row["KL"] for row in rows}
    frozen, oracle = by_name["frozen calibrated map"], by_name["oracle of each phase"]
    for row in rows:
        row["of low to high"] = _covered(row["KL"], low["KL"], high["KL"])
        row["of frozen to oracle"] = _covered(row["KL"], frozen, oracle)
    return rows


def _covered(kl: float, worst: float, best: float) -> float | None:
    return (worst - kl) / (worst - best) if worst > best else None
