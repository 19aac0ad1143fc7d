"""`dynaexq simulate`: what a policy would do with recorded or made-up traffic, on a machine that need not be here.

It sizes the experts, has the trace replayed, and shows the outcome.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dynaexq.errors import SettingsError
from dynaexq.memory import DeviceMemory
from dynaexq.planning.budget import ModelSpec, plan_memory, tier_choices
from dynaexq.quantization import tier_sizes
from dynaexq.settings import Settings
from dynaexq.simulator.replay import YARDSTICKS, Machine, Replay, Replicas, replay
from dynaexq.traces import WORKLOADS, Phase, Trace, TraceHeader, generate
from dynaexq.views.tables import print_table
from dynaexq.views.words import size

TIMELINE_POINTS = 200


@dataclass(frozen=True)
class Simulation:
    """A replay and what it was given."""

    trace: Trace
    settings: Settings
    tiers: tuple[str, ...]
    gains_known: bool
    outcome: Replay
    replicas: Replicas

    def figures(self) -> dict[str, Any]:
        """Everything that is shown, and the timeline, ready for JSON."""
        outcome, machine = self.outcome, self.outcome.machine
        tokens, moves = int(outcome.tokens.sum()), int(outcome.promotions.sum())
        seconds = tokens / machine.tokens_per_second  # of one replica, or of all one after the other
        return {
            "trace": {
                "shape": self.trace.header.shape,
                "top_k": self.trace.header.top_k,
                "tokens": tokens,
                "windows": len(outcome.tokens),
            },
            "machine": asdict(machine),
            "replicas": asdict(self.replicas),
            "tiers": self.tiers,
            "gains_known": self.gains_known,
            "policy": self.settings.policy if isinstance(self.settings.policy, str) else "callable",
            "share_upgraded": machine.num_slots / int(np.prod(self.trace.header.shape)),
            "coverage": {name: outcome.coverage(name) for name in outcome.tracks},
            "removed": {name: outcome.removed(name) for name in outcome.tracks},
            "moves": moves,
            "moves_per_1000_tokens_per_slot": 1000 * moves / max(1, tokens) / max(1, machine.num_slots),
            "bytes_moved": moves * machine.slot_nbytes,
            "share_of_link": moves * machine.slot_nbytes / (seconds * machine.link) if seconds else 0.0,
            "share_paused": float(outcome.paused.mean()),
            "phases": [self._phase_figures(phase) for phase in outcome.phases],
            "verdict": {**asdict(outcome.verdict), "lift": outcome.verdict.lift, "sentence": str(outcome.verdict)},
            "timeline": self._timeline(),
        }

    def _phase_figures(self, phase: Phase) -> dict[str, Any]:
        windows = (phase.first, phase.end)
        return {
            "name": phase.name,
            "tokens": int(self.outcome.tokens[slice(*windows)].sum()),
            "coverage": {name: self.outcome.coverage(name, *windows) for name in self.outcome.tracks},
            "removed": {name: self.outcome.removed(name, *windows) for name in self.outcome.tracks},
            "moves": int(self.outcome.promotions[slice(*windows)].sum()),
            "tokens_to_90_percent": self.outcome.tokens_to(0.9, phase),
        }

    def _timeline(self) -> list[dict[str, float]]:
        count = len(self.outcome.tokens)
        step, ends = -(-count // TIMELINE_POINTS), np.cumsum(self.outcome.tokens)
        points = [(first, min(first + step, count)) for first in range(0, count, step)]
        return [
            {"tokens": int(ends[end - 1]), **{n: self.outcome.coverage(n, first, end) for n in self.outcome.tracks}}
            for first, end in points
        ]

    def show(self) -> None:
        """Print the outcome as a table with a row per phase."""
        console, figures = Console(), self.figures()
        layers, experts = self.trace.header.shape
        title = f"{layers} x {experts} experts, {' + '.join(self.tiers)}, {figures['share_upgraded']:.0%} upgraded"
        if self.replicas.count > 1:
            title = f"{self.replicas.count} replicas, {title}"
        table = Table(title=f"{title}: share of the removable error removed")
        for name in ("phase", "tokens", "policy", *YARDSTICKS, "moves", "tokens to 90 %"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for row in figures["phases"]:
            shares = [f"{row['removed'][name]:.1%}" for name in ("policy", *YARDSTICKS)]
            table.add_row(
                row["name"], f"{row['tokens']:,}", *shares, f"{row['moves']:,}", f"{row['tokens_to_90_percent']:,}"
            )
        shares = [f"{figures['removed'][name]:.1%}" for name in ("policy", *YARDSTICKS)]
        table.add_row("all", f"{figures['trace']['tokens']:,}", *shares, f"{figures['moves']:,}", "", style="bold")
        print_table(console, table)
        console.print(
            f"moved {size(figures['bytes_moved'])}, {figures['share_of_link']:.2%} of the link; "
            f"{figures['moves_per_1000_tokens_per_slot']:.2%} of the slots per 1,000 tokens; "
            f"paused {figures['share_paused']:.0%} of the time"
        )
        if not self.gains_known:
            console.print("The trace has no errors for these tiers: every expert is taken to gain the same.")
        console.print(figures["verdict"]["sentence"])


def simulate(
    trace: Trace,
    settings: Settings,
    upgraded: float | None = None,
    dense: int | None = None,
    link: float = 25e9,
    tokens_per_second: float = 50.0,
    replicas: Replicas | None = None,
) -> Simulation:
    """Replay `trace` as `settings` say.

    Args:
        upgraded: share of the experts with an upgrade, in place of `hbm_budget`.
        dense: bytes of all weights that are not experts; by default what the trace says.
        link: bytes per second from host memory to the device; PCIe 4 x16 reaches 25e9.
        replicas: copies that share the traffic; one by default.

    Raises:
        SettingsError: neither a budget nor a share, or a trace without the shape of its experts.
        BudgetError: the budget is too small.
    """
    tiers, num_slots, slot_nbytes = _sized(trace.header, settings, upgraded, dense)
    gain, known = gains(trace.header, tiers)
    machine = Machine(num_slots, slot_nbytes, link, tokens_per_second)
    outcome = replay(trace, gain, machine, settings, replicas)
    return Simulation(trace, settings, tiers, known, outcome, replicas or Replicas())


def gains(header: TraceHeader, tiers: tuple[str, ...]) -> tuple[np.ndarray, bool]:
    """The error `[L, E]` that the upgrade of `tiers` removes, and whether it is known; else ones."""
    if header.errors is None or not set(tiers) <= set(header.tiers) or len(tiers) < 2:
        return np.ones(header.shape), False
    base, upgrade = (header.errors[..., header.tiers.index(tier)] for tier in tiers)
    return (base - upgrade).astype(np.float64), True


def _sized(
    header: TraceHeader, settings: Settings, upgraded: float | None, dense: int | None
) -> tuple[tuple[str, ...], int, int]:
    """The tiers, the number of upgrade slots and the bytes of one."""
    spec = _spec(header, settings, header.dense if dense is None else dense)
    if upgraded is not None:
        return _share_upgraded(spec, upgraded)
    if isinstance(settings.hbm_budget, str):
        raise SettingsError("give a budget for the weights, such as 20GiB, or the share of experts to upgrade")
    plan = plan_memory(spec, settings.hbm_budget)
    if plan.upgrade is None:
        raise SettingsError(
            f"{settings.hbm_budget:,} bytes are best spent on one tier, {plan.base.precision}, and nothing would "
            "move; name two tiers, such as int2,int4"
        )
    return plan.tiers, plan.num_slots, plan.upgrade.nbytes


def _share_upgraded(spec: ModelSpec, upgraded: float) -> tuple[tuple[str, ...], int, int]:
    (base, upgrade), *others = spec.choices
    if others or upgrade is None:
        raise SettingsError("a share of experts to upgrade needs two tiers, such as int2,int4")
    if not 0 < upgraded <= 1:
        raise SettingsError(f"the share of experts to upgrade must lie in (0, 1], got {upgraded}")
    num_slots = int(upgraded * spec.num_layers * spec.num_experts)
    return (base.precision, upgrade.precision), num_slots, upgrade.nbytes


def _spec(header: TraceHeader, settings: Settings, dense: int) -> ModelSpec:
    """The model that a trace was taken from, as far as planning must know it."""
    if header.expert is None:
        raise SettingsError("the trace does not say what shape an expert has, and so not how large it is")
    shape, dtype = header.expert, getattr(torch, header.dtype)
    pairs = tier_sizes(shape, dtype, settings.group_size, settings.scale_bits, tier_choices(settings.tiers))
    num_layers, num_experts = header.shape
    weights = num_layers * num_experts * shape.num_weights
    workspace = DeviceMemory.workspace_bytes(num_layers, num_experts)
    return ModelSpec(
        "the model of the trace",
        header.dtype,
        num_layers,
        num_experts,
        experts=weights * dtype.itemsize,
        num_weights=weights,
        dense=dense,
        workspace=workspace,
        choices=pairs,
        offered=pairs,
        quantizer=settings.quantizer,
    )


@contextmanager
def provided(
    path: Path | None, workload: str | None, tokens: int, phases: int, window: int, seed: int
) -> Iterator[Trace]:
    """The trace at `path`, made up first if a `workload` is named; without a path it is gone afterwards.

    Raises:
        SettingsError: neither a path nor a workload, or one that is not known, or the path is taken.
    """
    if workload is None:
        if path is None:
            raise SettingsError("name a trace, or have one made up with --generate qwen3-30b")
        yield Trace(path)
        return
    if workload not in WORKLOADS:
        raise SettingsError(f"there is no workload {workload!r}; there are {', '.join(WORKLOADS)}")
    if path is not None and path.exists():
        raise SettingsError(
            f"{path} exists, and what is made up would take its place; leave out --generate, or name another"
        )
    with TemporaryDirectory() as scratch:
        target = path or Path(scratch) / "trace.npz"
        generate(target, WORKLOADS[workload], tokens, phases, window, seed)
        yield Trace(target)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["half_life=256", "allocation=per_layer"]` as keyword arguments of `Settings`."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"an option is written name=value, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options
