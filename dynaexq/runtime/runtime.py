"""The runtime of one patched model: it owns the memory, asks the policy, and ticks.

One decision spans several ticks and none of them waits: *publish* what has arrived, *observe* what was routed,
*decide*, *submit*. Layers never see the runtime; it hands each its ports when the model is patched.
"""

import logging
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynaexq.errors import BudgetError, ClosedError, SettingsError
from dynaexq.kernels import exchange_for
from dynaexq.memory import DeviceMemory, SwapPipeline, copier_for, on_device
from dynaexq.memory.device_memory import bytes_per_second
from dynaexq.memory.tensor_bytes import held_tensors, weight_bytes
from dynaexq.policy import Verdict
from dynaexq.policy.controller import ControlLoop
from dynaexq.policy.hotness import HotnessTracker
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.quantization import ExpertCodec
from dynaexq.runtime.experts import LayerPorts
from dynaexq.runtime.hotness_snapshot import is_hotness, read_snapshot, write_snapshot
from dynaexq.runtime.moe import LayerView, layer_names
from dynaexq.runtime.report import Report, Traffic
from dynaexq.runtime.steering import Steering
from dynaexq.runtime.tick_loop import Poller, StepCount, is_capturing
from dynaexq.settings import Settings, parse_bytes
from dynaexq.traces import TraceHeader
from dynaexq.traces.recorder import Recorder, Recording
from dynaexq.types import BITS, MemoryPlan
from dynaexq.weights.export import StoredExperts
from dynaexq.weights.sources import ExpertLoader

logger = logging.getLogger(__name__)


class Runtime:
    """Precision management of one patched model; `dynaexq.patch` returns it and `model.dynaexq` is it.

    All arrays are `[num_layers, num_experts]` over the model's sparse layers in order. As a context manager it closes
    itself at the end of the block.

    Args:
        base: the base slab, if it exists already; see `memory.DeviceMemory`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: MemoryPlan,
        codec: ExpertCodec,
        settings: Settings,
        device: torch.device,
        base: Tensor | None = None,
    ):
        self.plan, self.settings, self.device = plan, settings, device
        self.codec = codec
        self._model = weakref.ref(model)
        slot_nbytes, exchange = codec.upgrade_layout.nbytes, exchange_for(device, codec.dtype)
        self._memory = DeviceMemory(
            plan.num_layers, plan.num_experts, plan.base.nbytes, slot_nbytes, plan.num_slots, device, base, exchange
        )
        self.follows_replays = self._memory.follows_replays
        """Whether precision goes on changing while CUDA graphs of the model are replayed, where no Python runs."""
        self._tracker = HotnessTracker(self._memory.counter, settings)
        self._traffic, self._recorder = Traffic(), Recorder()
        self._ticking, self._ticks = threading.Lock(), 0
        self._steps, self._poller = StepCount(self._memory, settings.update_interval), Poller(self._look)
        self._frozen = self._closed = False

    def load(self, supply: ExpertLoader) -> None:
        """Have every expert put in its place, then fill every upgrade slot by the error it removes."""
        with on_device(self.device):  # where memory is locked
            self._errors, store = supply.place(self.codec, self._memory.base, self.settings)
        try:
            copier = copier_for(self.device, self._memory.pool.slot_nbytes, staged=store.page_locked(0) is None)
        except BaseException:
            store.close()
            raise
        gain = self._errors[..., 0] - self._errors[..., -1]
        limit = CopyRateLimiter(
            bytes_per_second(self.settings.copy_rate_limit, self.device), self._memory.pool.slot_nbytes
        )
        self._control = ControlLoop(self._tracker, gain, limit, self.settings)
        self._pipeline = SwapPipeline(self._memory.table, self._memory.pool, store, copier, BITS[self.plan.tiers[-1]])
        weakref.finalize(self, SwapPipeline.forget, self._pipeline)
        weakref.finalize(self, Poller.stop, self._poller)  # the later one goes first
        self._steering = Steering(self._control, self._pipeline)
        self._steering.fill()

    def ports(self, layer: int) -> LayerPorts:
        """What joins one layer's experts to the runtime; the first layer's forward is where steps are counted."""
        before_forward = self._on_forward if layer == 0 else None
        return LayerPorts(layer, self._memory, before_forward)

    def view(self, layer: int) -> LayerView:
        """What one layer's sparse block shows of the runtime."""
        return LayerView(layer, self._tracker, self._control.controller, self._pipeline, self.plan.base.bits)

    @property
    def model_name(self) -> str:
        """Name of the model's class."""
        return type(self._model()).__name__

    @property
    def stored(self) -> StoredExperts:
        """Its experts where they lie; once closed, without those that wait on the host."""
        store = None if self._closed else self._pipeline.store
        return StoredExperts(self.codec, self._memory.base, self._errors, store)

    def tick(self) -> bool:
        """One step of control: publish, observe, decide, submit. Never waits for a copy.

        Returns:
            Whether it ran; a tick that finds another one at work, or a CUDA graph being captured, does nothing.

        Raises:
            ClosedError: the runtime was closed.
        """
        self._check_open()
        return not is_capturing(self.device) and self._try_tick()

    def drain(self) -> None:
        """Wait for every copy in flight and publish it."""
        self._check_open()
        with self._ticking:
            self._pipeline.drain()

    def freeze(self) -> None:
        """Publish what is in flight, then leave every expert at its precision. Traffic is still observed."""
        with self._ticking:
            self._pipeline.drain()
            self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._check_open()
        self._frozen = False

    @torch.inference_mode(False)  # what is allocated here outlives the caller's inference mode
    def set_budget(self, hbm_budget: int | str) -> None:
        """Shrink or grow the upgrade slab; the new ceiling holds when this returns.

        Raises:
            SettingsError: not a size.
            BudgetError: too small for the dense weights and the base of every expert; nothing has changed then.
        """
        self._check_open()
        budget = parse_bytes(hbm_budget)
        with self._ticking:
            memory = self.memory()
            fixed = memory["total"] - memory["upgrade"]
            if budget < fixed:
                raise BudgetError(
                    f"hbm_budget of {budget:,} bytes is too small: dense weights, workspace and every expert's "
                    f"{self.plan.base.precision} base take {fixed:,}; give that much, or patch again with lower tiers",
                    budget,
                    fixed,
                )
            slot = self._memory.pool.slot_nbytes
            slots = min(self._memory.table.kinds().size, (budget - fixed) // slot) if slot else 0
            self._steering.resize(slots)
            self.plan = replace(self.plan, budget=budget, num_slots=slots)
            if not self._frozen:
                self._steering.fill()

    def heat(self) -> dict[str, np.ndarray]:
        """Hotness `[num_experts]` of every layer, by the path of its sparse block."""
        names = layer_names(self._model(), self._tracker)
        return dict(zip(names, self._tracker.hotness.copy(), strict=True))

    def save_hotness(self, path: str | Path) -> None:
        """Write what is hot now to a safetensors file, as a warm start for `load_hotness`."""
        write_snapshot(path, self.model_name, self.heat())

    def load_hotness(self, path: str | Path) -> None:
        """Take the hotness that `save_hotness` wrote and choose the upgrades anew, frozen or not; waits for them.

        Raises:
            HotnessError: not a profile, damaged, or of another model; nothing has changed then.
        """
        self.warm_start(read_snapshot(path, self.model_name, list(self.heat()), self.plan.num_experts))

    @torch.inference_mode(False)  # likewise
    def warm_start(self, hotness: np.ndarray) -> None:
        """Take `hotness [L, E]` for what was observed and choose the upgrades anew, frozen or not; waits for them.

        Raises:
            SettingsError: of another shape, or not finite, or negative; nothing has changed then.
        """
        self._check_open()
        shape = self._tracker.hotness.shape
        if np.shape(hotness) != shape or not is_hotness(hotness):
            raise SettingsError(f"hotness must be {shape}, finite and not negative, got {np.shape(hotness)}")
        with self._ticking:
            self._tracker.hotness = np.array(hotness, dtype=np.float64)
            self._steering.choose_anew()

    def trace(self, path: str | Path) -> Recording:
        """Record what every tick drains, for `dynaexq simulate`, until the recording is closed; use it in a `with`.

        Raises:
            TraceError: another recording is running.
            OSError: the file cannot be written.
        """
        self._check_open()
        layers = layer_names(self._model(), self._tracker)
        header = header_of(layers, self.plan, self.codec, self._errors, self._dense_bytes())
        return self._recorder.start(path, header)

    def close(self) -> None:
        """Wait once for what is in flight, then stop for good. The model goes on answering at its last precisions."""
        self._recorder.close()
        self._poller.stop()
        with self._ticking:
            if not self._closed:
                self._frozen = self._closed = True
                self._pipeline.close()

    def memory(self) -> dict[str, int]:
        """Device bytes really allocated: dense, base, upgrade, staging, workspace and their total; and the budget."""
        parts = {"dense": self._dense_bytes(), **self._memory.parts()}
        return {"budget": self.plan.budget, **parts, "total": sum(parts.values())}

    def tiers(self) -> np.ndarray:
        """Published bits of every expert: 2, 4, 8, or 16 for the model's own dtype."""
        kinds = self._memory.table.kinds()
        return np.where(kinds > 0, kinds, self.plan.base.bits)

    def hotness(self) -> np.ndarray:
        """Moving average of every expert's routing mass per token."""
        return self._tracker.hotness.copy()

    def routed_mass(self) -> np.ndarray:
        """Routing mass that every expert has received since the start. Waits for the device."""
        return self._memory.counter.totals()

    def stats(self) -> dict[str, Any]:
        """Counts since the start; `hot_coverage` is the share of the routing mass that met an upgraded expert."""
        return {
            "steps": self._steps.total,
            "ticks": self._ticks,
            **vars(self._pipeline.counts),
            "in_flight": self._pipeline.num_in_flight,
            "experts": self._memory.table.kinds().size,
            "slots": self._memory.pool.num_slots,
            "upgraded": int((self._memory.table.kinds() > 0).sum()),
            "host_bytes": self._pipeline.store.nbytes,
            **vars(self._traffic),
            "hot_coverage": self._traffic.hot_coverage,
        }

    def report(self) -> Report:
        """Bytes, tiers, traffic, moves and verdict as a table; prints itself, and shows itself in a notebook."""
        return Report(self.memory(), self.stats(), self.tiers(), self.plan.tiers, str(self.verdict()))

    def verdict(self) -> Verdict:
        """Is it worth it here? In words (`str`), and the shares behind them; looks at the traffic since the start."""
        return self._control.verdict(self._memory.table.kinds() > 0, self._frozen)

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"Runtime({' + '.join(self.plan.tiers)}, {stats['upgraded']} of {stats['experts']} experts upgraded, "
            f"{self.memory()['total']:,} of {self.plan.budget:,} bytes)"
        )

    def _on_forward(self, tokens: int) -> None:
        if not is_capturing(self.device):
            self._steps.add()
            self._look()
            self._steps.add_tokens(tokens)
        elif self.follows_replays:
            self._poller.start()

    def _look(self) -> int:
        """Tick if it is time, from a forward or from the poller; how many forwards there were so far."""
        try:
            if self._steps.is_due:
                self._try_tick()
        except Exception:
            if not callable(self.settings.policy):
                raise
            logger.exception("the policy failed; precision is frozen, see runtime.thaw()")
            self._frozen = True
        return self._steps.total

    @torch.inference_mode(False)  # likewise
    def _try_tick(self) -> bool:
        if not self._ticking.acquire(blocking=False):
            return False
        try:
            if self._closed:
                return False
            self._tick()
            return True
        finally:
            self._ticking.release()

    def _tick(self) -> None:
        self._ticks += 1
        met = self._memory.table.kinds() > 0  # the tiers that the traffic since the last tick met
        self._pipeline.settle()
        steps = self._steps.take()
        mass, tokens = self._control.observe(steps, met)
        self._traffic.add(mass, tokens, met)
        self._recorder.add(mass, tokens, steps, self._memory.counter.top_k)
        if self._memory.pool.num_slots:
            self._steering.decide(self._frozen)

    def _dense_bytes(self) -> int:
        """Bytes of all weights and buffers of the model on the runtime's device."""
        model = self._model()
        if model is None:
            return 0
        return weight_bytes(t for t in held_tensors(model) if t.device == self.device)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this runtime was closed; patch the model again to manage its precision")


def header_of(layers: list[str], plan: MemoryPlan, codec: ExpertCodec, errors: np.ndarray, dense: int) -> TraceHeader:
    """What a trace says about the model whose sparse blocks are called `layers`."""
    dtype = str(codec.dtype).removeprefix("torch.")
    return TraceHeader(tuple(layers), plan.num_experts, 0, plan.tiers, errors, codec.shape, dtype, dense)
