"""`Runtime`: what users ask of a patched model, on any number of devices. Each device decides for itself.

It adds up what its `DeviceRuntime`s know and passes on what it is told; it owns no memory and decides nothing.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from dynaexq.errors import ClosedError, SettingsError
from dynaexq.kernels.cpu.team import team
from dynaexq.policy import Verdict
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.health import Health
from dynaexq.runtime.hotness_snapshot import Snapshot, is_hotness, read_snapshot, write_snapshot
from dynaexq.runtime.moe import layer_names
from dynaexq.runtime.routing_totals import RoutingTotals
from dynaexq.settings import CONTROL_OPTIONS, Settings, parse_bytes
from dynaexq.traces import TraceHeader
from dynaexq.traces.recorder import Recorder, Recording
from dynaexq.types import BITS, MemoryPlan

if TYPE_CHECKING:
    from dynaexq.views.report import Report

logger = logging.getLogger(__name__)


class Runtime:
    """Precision management of one patched model; `dynaexq.patch` returns it and `model.dynaexq` is it.

    Examples:
        >>> runtime = dynaexq.patch(model, hbm_budget="20GiB")       # doctest: +SKIP
        >>> model.generate(**inputs)                                  # doctest: +SKIP
        >>> print(runtime.report())                                   # doctest: +SKIP
        >>> runtime.set_budget("16GiB")                               # doctest: +SKIP

    All arrays are `[num_layers, num_experts]` over the model's sparse layers in order. As a context manager it closes
    itself at the end of the block.

    Args:
        parts: the runtime of each device, and the numbers of its layers in the model.
    """

    def __init__(self, model: nn.Module, parts: Sequence[tuple[DeviceRuntime, Sequence[int]]]):
        self._model = weakref.ref(model)
        self._parts = tuple(part for part, _ in parts)
        self._rows = [list(layers) for _, layers in parts]
        self._recorder = Recorder(self._rows)
        for number, part in enumerate(self._parts):
            part.listener = self._recorder.listener(number)

    @property
    def devices(self) -> tuple[DeviceRuntime, ...]:
        """The runtime of each device, for what is asked of one alone."""
        return self._parts

    @property
    def settings(self) -> Settings:
        """The options in force."""
        return self._parts[0].settings

    @property
    def plan(self) -> MemoryPlan:
        """How the budget is spent, on all devices together."""
        first, *others = (part.plan for part in self._parts)
        return sum(others, start=first)

    @property
    def follows_replays(self) -> bool:
        """Whether precision goes on changing on every device while the model is compiled, CUDA graphs included."""
        return all(part.follows_replays for part in self._parts)

    def tick(self) -> bool:
        """One step of control on every device: publish, observe, decide, submit. Never waits for a copy.

        Returns:
            Whether any ran; a tick that finds another one at work, or a CUDA graph being captured, does nothing.

        Raises:
            ClosedError: the runtime was closed.
        """
        ran = [part.tick() for part in self._parts]
        return any(ran)

    def drain(self) -> None:
        """Wait for every copy in flight and publish it."""
        self._each(DeviceRuntime.drain)

    def freeze(self) -> None:
        """Publish what is in flight, then leave every expert at its precision. Traffic is still observed."""
        self._each(DeviceRuntime.freeze)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._each(DeviceRuntime.thaw)

    def pin(self, layer: int, expert: int, tier: str | None) -> None:
        """Hold one expert at a precision, whatever the traffic and the policy; waits for its copy.

        Args:
            tier: the base or the upgrade of this model, such as `"int4"`; None lets the expert go again.

        Raises:
            SettingsError: there is no such layer, expert or tier, or every slot is pinned to another expert.
        """
        plan = self.plan
        if not (0 <= layer < plan.num_layers and 0 <= expert < plan.num_experts):
            raise SettingsError(
                f"expected a layer below {plan.num_layers} and an expert below {plan.num_experts}, got {layer!r} and "
                f"{expert!r}"
            )
        if tier is not None and tier not in plan.tiers:
            raise SettingsError(f"expected a tier of {plan.tiers}, or None to unpin, got {tier!r}")
        pin = 0 if tier is None else 1 if tier == plan.tiers[-1] and len(plan.tiers) > 1 else -1
        for part, rows in zip(self._parts, self._rows, strict=True):
            if layer in rows:
                part.pin(rows.index(layer), expert, pin)

    def set_policy(self, policy: str | Callable[..., Any], **options: Any) -> None:
        """Decide by another policy from now on, on all devices. What was learned of the traffic and pins stay.

        Args:
            policy: as `DynaExqConfig(policy=...)`.
            options: of control, such as `hysteresis=0.5` or `half_life=256`; what is not named stays.

        Raises:
            SettingsError: an option that is not one of control, or a value that it cannot take.
        """
        foreign = sorted(options.keys() - CONTROL_OPTIONS)
        if foreign:
            raise SettingsError(f"{', '.join(foreign)} cannot be changed while a model runs; patch again for that")
        settings = self.settings.with_control(policy=policy, **options)
        for part in self._parts:
            part.set_policy(settings)

    def set_budget(self, hbm_budget: int | str) -> None:
        """Give every device a new ceiling; it holds when this returns.

        Raises:
            SettingsError: not a size.
            BudgetError: too small for the dense weights and the base of every expert on one of the devices; nothing
                has changed then.
        """
        budget = parse_bytes(hbm_budget)
        for part in self._parts:
            part.slots_within(budget, part.reserved)
        before = [part.plan.budget for part in self._parts]
        try:
            for part in self._parts:
                part.set_budget(budget)
        except BaseException:
            for part, old in zip(self._parts, before, strict=True):
                if part.plan.budget != old:
                    part.set_budget(old)
            raise

    def save_hotness(self, path: str | Path) -> None:
        """Write what has been hot to a safetensors file, as a warm start for `load_hotness`.

        With the kinds of traffic that were told apart, unless the model lies on several devices, where each has its
        own.
        """
        average = self._stacked(lambda part: part.control.tracker.average)
        learned = self._parts[0].control.tracker.learned if len(self._parts) == 1 else None
        write_snapshot(path, self._model_name, self._layer_names(), Snapshot(average, learned))

    def load_hotness(self, path: str | Path, revision: str | None = None) -> None:
        """Take the hotness that `save_hotness` wrote and choose the upgrades anew, frozen or not; waits for them.

        Args:
            path: the file, or `"organization/name"` for `hotness.safetensors` of that repository on the Hub.
            revision: branch, tag or commit of the repository.

        Raises:
            HotnessError: not a hotness snapshot, damaged, of another model, or not to be had from the Hub; nothing
                has changed then.
            FileNotFoundError: there is no such file.
        """
        self._check_open()
        found = read_snapshot(path, self._model_name, self._layer_names(), self.plan.num_experts, revision)
        self._start_from(found)

    def warm_start(self, hotness: np.ndarray) -> None:
        """Take `hotness [L, E]` for what was observed and choose the upgrades anew, frozen or not; waits for them.

        Raises:
            SettingsError: of another shape, or not finite, or negative; nothing has changed then.
        """
        self._check_open()
        shape = self.hotness().shape
        if np.shape(hotness) != shape or not is_hotness(hotness):
            raise SettingsError(f"hotness must be {shape}, finite and not negative, got {np.shape(hotness)}")
        self._start_from(Snapshot(np.asarray(hotness)))

    def trace(self, path: str | Path) -> Recording:
        """Record what every tick sees, for `dynaexq simulate`, until the recording is closed; use it in a `with`.

        Raises:
            TraceError: another recording is running.
            OSError: the file cannot be written.
        """
        self._check_open()
        plan, codec = self.plan, self._parts[0].codec
        errors = self._stacked(lambda part: part.errors)
        dtype = str(codec.dtype).removeprefix("torch.")
        dense = self.memory()["dense"]
        header = TraceHeader(
            tuple(self._layer_names()), plan.num_experts, 0, plan.tiers, errors, codec.shape, dtype, dense
        )
        return self._recorder.start(path, header)

    def close(self) -> None:
        """Wait once for what is in flight, then stop for good. The model goes on answering at its last precisions."""
        try:
            self._recorder.close()
        except Exception:
            logger.exception("the routing trace could not be finished")
        finally:
            self._each(DeviceRuntime.close)

    def memory(self) -> dict[str, int]:
        """Device bytes really allocated: dense, base, upgrade, staging, workspace and their total; and the budget.

        With the option `kv_reserve` also the bytes that are kept for the KV cache, which count to the total.
        """
        devices = [part.nbytes() for part in self._parts]
        if self.settings.kv_reserve is not None:
            devices = [{**part.nbytes(), "kv_reserve": part.reserved} for part in self._parts]
        parts = {name: sum(device[name] for device in devices) for name in devices[0]}
        return {"budget": self.plan.budget, **parts, "total": sum(parts.values())}

    def tiers(self) -> np.ndarray:
        """Published bits of every expert: 2, 4, 8, or 16 for the model's own dtype."""
        kinds = self._stacked(lambda part: part.memory.table.kinds())
        return np.where(kinds > 0, kinds, self.plan.base.bits)

    def hotness(self) -> np.ndarray:
        """Routing mass per token that every expert has got: a moving average over all traffic.

        Decisions go by what is expected of the request at work instead; see `policy.requests`.
        """
        return self._stacked(lambda part: part.control.tracker.hotness.copy())

    def routed_mass(self) -> np.ndarray:
        """Routing mass that every expert has received since the start. Waits for the device."""
        return self._stacked(lambda part: part.memory.counter.totals())

    def stats(self) -> dict[str, Any]:
        """Counts since the start, over all devices, each of which sees every step.

        `hot_coverage` is the share of the routing mass that met an upgraded expert.
        """
        totals = RoutingTotals.merged([part.totals for part in self._parts])
        moves = [vars(part.pipeline.counts) for part in self._parts]
        return {
            "steps": max(part.steps.total for part in self._parts),
            "ticks": max(part.ticks for part in self._parts),
            **{name: sum(counts[name] for counts in moves) for name in moves[0]},
            "in_flight": self._sum(lambda part: part.pipeline.num_in_flight),
            "experts": self._sum(lambda part: part.upgraded().size),
            "slots": self._sum(lambda part: part.pipeline.num_slots),
            "upgraded": self._sum(lambda part: int(part.upgraded().sum())),
            "host_bytes": self._sum(lambda part: part.pipeline.store.nbytes),
            **vars(totals),
            "hot_coverage": totals.hot_coverage,
        }

    def health(self) -> Health:
        """Whether precision follows the traffic as it should, since when not, and why; see `Health`."""
        return Health.merged([part.health() for part in self._parts])

    def report(self) -> "Report":
        """Bytes, tiers, traffic, moves, health and verdict to read; shows itself in a notebook, too."""
        from dynaexq.views.report import Report  # here, as few programs look

        return Report(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """All that there is to see, as plain data that JSON can hold.

        `bits` and `hotness` are `[num_layers][num_experts]`; `coverage` and `moves` are the latest, oldest first, with
        seconds since the epoch. On several devices the coverage is that of the first.
        """
        health, verdict = self.health(), self.verdict()
        return {
            "model": self._model_name,
            "layers": self._layer_names(),
            "tiers": list(self.plan.tiers),
            "tier_bits": [BITS[tier] for tier in self.plan.tiers],
            "memory": self.memory(),
            "stats": {**self.stats(), **self._machine()},
            "bits": self.tiers().tolist(),
            "hotness": self.hotness().tolist(),
            "health": {**vars(health), "words": str(health)},
            "verdict": {**vars(verdict), "words": str(verdict)},
            "coverage": [vars(moment) for moment in list(self._parts[0].history.moments)],
            "moves": self._moves(),
        }

    def _moves(self) -> list[dict[str, Any]]:
        """The latest moves of all devices, by time, with the layers' numbers in the model."""
        moves = [
            {**vars(move), "layer": layers[move.layer]}
            for part, layers in zip(self._parts, self._rows, strict=True)
            for move in list(part.history.moves)
        ]
        return sorted(moves, key=lambda move: move["at"])

    def _start_from(self, found: Snapshot) -> None:
        for part, rows in zip(self._parts, self._rows, strict=True):
            mine = found.of_layers(rows)
            part.warm_start(mine.hotness, mine.learned)

    def _machine(self) -> dict[str, str]:
        """What is chosen of the machine."""
        on_cpu = any(part.device.type == "cpu" for part in self._parts)
        return {"kernel_threads": str(team)} if on_cpu else {}

    def verdict(self) -> Verdict:
        """Whether it is worth it here: in words (`str`), and the shares behind them, from the traffic so far."""
        return Verdict.merged(
            [part.control.verdict(part.upgraded(), part.frozen) for part in self._parts], [*map(len, self._rows)]
        )

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats, plan = self.stats(), self.plan
        where = f" on {len(self._parts)} devices" if len(self._parts) > 1 else ""
        return (
            f"Runtime({' + '.join(plan.tiers)}{where}, {stats['upgraded']} of {stats['experts']} experts upgraded, "
            f"{self.memory()['total']:,} of {plan.budget:,} bytes)"
        )

    @property
    def _model_name(self) -> str:
        return type(self._model()).__name__

    def _layer_names(self) -> list[str]:
        """Paths of the sparse blocks in the order of the model's layers."""
        names: dict[int, str] = {}
        for rows, part in zip(self._rows, self._parts, strict=True):
            names.update(zip(rows, layer_names(self._model(), part.control.tracker), strict=True))
        return [names[row] for row in sorted(names)]

    def _each(self, act: Callable[[DeviceRuntime], object]) -> None:
        with ExitStack() as acts:  # one that fails keeps no other from its turn
            for part in reversed(self._parts):
                acts.callback(act, part)

    def _sum(self, count: Callable[[DeviceRuntime], int]) -> int:
        return sum(map(count, self._parts))

    def _stacked(self, look: Callable[[DeviceRuntime], np.ndarray]) -> np.ndarray:
        """What `look` finds `[layers, ...]` on each device, in the order of the model's layers."""
        order = np.argsort(np.concatenate(self._rows), kind="stable")
        return np.concatenate([look(part) for part in self._parts])[order]

    def _check_open(self) -> None:
        if any(part.closed for part in self._parts):
            raise ClosedError("this runtime was closed; patch the model again to manage its precision")
