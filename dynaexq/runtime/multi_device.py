"""The runtimes of a model whose layers lie on several devices, seen as one. Each keeps to a budget of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dynaexq.policy import Verdict
from dynaexq.runtime.hotness_snapshot import write_snapshot
from dynaexq.runtime.report import Report
from dynaexq.runtime.runtime import Runtime


class MultiDeviceRuntime:
    """Several runtimes; arrays are `[num_layers, num_experts]` over all layers of the model in order.

    Args:
        parts: each runtime and the numbers of its layers in the model.
    """

    def __init__(self, parts: Sequence[tuple[Runtime, list[int]]]):
        self.runtimes = tuple(runtime for runtime, _ in parts)
        self._order = np.argsort(np.concatenate([layers for _, layers in parts]))

    @staticmethod
    def of(parts: Sequence[tuple[Runtime, list[int]]]) -> "Runtime | MultiDeviceRuntime":
        """The one runtime there is, or a group of several."""
        return parts[0][0] if len(parts) == 1 else MultiDeviceRuntime(parts)

    @property
    def follows_replays(self) -> bool:
        """Whether precision goes on changing on every device while CUDA graphs of the model are replayed."""
        return all(runtime.follows_replays for runtime in self.runtimes)

    def tick(self) -> bool:
        """One step of control on every device; whether any of them ran."""
        ran = [runtime.tick() for runtime in self.runtimes]
        return any(ran)

    def drain(self) -> None:
        """Wait for every copy in flight and publish it."""
        self._each(Runtime.drain)

    def freeze(self) -> None:
        """Leave every expert at its precision."""
        self._each(Runtime.freeze)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._each(Runtime.thaw)

    def set_budget(self, hbm_budget: int | str) -> None:
        """A new ceiling for each device; a BudgetError leaves those before it changed and the others as they were."""
        self._each(lambda runtime: runtime.set_budget(hbm_budget))

    def save_hotness(self, path: str | Path) -> None:
        """Write what is hot now, of all devices together; see `Runtime.save_hotness`."""
        heat = {name: row for runtime in self.runtimes for name, row in runtime.heat().items()}
        write_snapshot(path, self.runtimes[0].model_name, heat)

    def load_hotness(self, path: str | Path) -> None:
        """Take what `save_hotness` wrote and choose every device's upgrades anew; see `Runtime.load_hotness`."""
        self._each(lambda runtime: runtime.load_hotness(path))

    def close(self) -> None:
        """Stop for good. The model goes on answering at its last precisions."""
        self._each(Runtime.close)

    def memory(self) -> dict[str, int]:
        """Device bytes really allocated, of all devices together; `runtimes` has them one by one."""
        parts = [runtime.memory() for runtime in self.runtimes]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def tiers(self) -> np.ndarray:
        """Published bits of every expert."""
        return self._stacked(Runtime.tiers)

    def hotness(self) -> np.ndarray:
        """Moving average of every expert's routing mass per token."""
        return self._stacked(Runtime.hotness)

    def routed_mass(self) -> np.ndarray:
        """Routing mass that every expert has received since the start."""
        return self._stacked(Runtime.routed_mass)

    def stats(self) -> dict[str, Any]:
        """Counts since the start, of all devices together."""
        parts = [runtime.stats() for runtime in self.runtimes]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        total["hot_coverage"] = total["hot_mass"] / total["routed_mass"] if total["routed_mass"] else 0.0
        return total

    def report(self) -> Report:
        """Bytes, tiers, traffic and moves as a table."""
        verdict = "\n".join(f"{runtime.device}: {runtime.verdict()}" for runtime in self.runtimes)
        return Report(self.memory(), self.stats(), self.tiers(), self.runtimes[0].plan.tiers, verdict)

    def verdict(self) -> tuple[Verdict, ...]:
        """Is it worth it here? One answer a device, as each decides by itself; `trace` likewise is each one's own."""
        return tuple(runtime.verdict() for runtime in self.runtimes)

    def __enter__(self) -> "MultiDeviceRuntime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MultiDeviceRuntime({', '.join(f'{runtime.device}: {runtime!r}' for runtime in self.runtimes)})"

    def _each(self, act: Callable[[Runtime], object]) -> None:
        for runtime in self.runtimes:
            act(runtime)

    def _stacked(self, look: Callable[[Runtime], np.ndarray]) -> np.ndarray:
        return np.concatenate([look(runtime) for runtime in self.runtimes])[self._order]
