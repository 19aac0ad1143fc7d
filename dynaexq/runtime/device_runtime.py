"""Precision management of the layers of a model that lie on one device: it owns the memory, and ticks.

A move spans several ticks, none of which waits: `policy.ControlLoop.step` has the story. Layers never see this object;
each is handed what joins it to the memory (`LayerPorts`) when the model is patched. Users see `Runtime`.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dynaexq.errors import BudgetError, ClosedError
from dynaexq.kernels import exchange_for
from dynaexq.memory import DeviceMemory, SwapPipeline, bytes_per_second, copier_for, on_device
from dynaexq.memory.slab_pool import LEAST_SEGMENTS
from dynaexq.memory.tensor_bytes import held_tensors, weight_bytes
from dynaexq.policy.controller import ControlLoop, Window
from dynaexq.policy.kinds import Arrival, LearnedKinds
from dynaexq.policy.rate_limit import CopyRateLimiter
from dynaexq.quantization import ExpertCodec
from dynaexq.runtime.door import arrival
from dynaexq.runtime.experts import LayerPorts
from dynaexq.runtime.health import DEGRADED, OK, STANDING_STILL, Health, HealthMonitor
from dynaexq.runtime.history import History
from dynaexq.runtime.moe import LayerView
from dynaexq.runtime.routing_totals import RoutingTotals
from dynaexq.runtime.tick_loop import Poller, StepCount, is_capturing
from dynaexq.safeguards.call_lock import CallLock
from dynaexq.safeguards.weak_method import WeakMethod
from dynaexq.settings import Settings
from dynaexq.types import BITS, MemoryPlan
from dynaexq.weights.export import StoredExperts
from dynaexq.weights.sources import ExpertLoader

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 64
"""How many times the usual interval between ticks may grow while they fail."""

CEILING_INTERVAL = 16
"""Ticks between looks at what the dense weights take: a walk through the model costs as much as a few ticks."""

Listener = Callable[[Window], None]


class DeviceRuntime:
    """Experts of `plan.num_layers` layers on one device, loaded when the constructor returns.

    Every expert is put in its place, then every upgrade slot is filled by the error it removes. If that fails,
    everything that was allocated is freed.

    Args:
        loader: where the experts come from.
        base: the base slab, if it was prefetched; see `memory.DeviceMemory`.

    Attributes:
        listener: called with every tick's window.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: MemoryPlan,
        codec: ExpertCodec,
        settings: Settings,
        device: torch.device,
        loader: ExpertLoader,
        base: Tensor | None = None,
    ):
        self.plan, self.codec, self.settings, self.device = plan, codec, settings, device
        self.frozen = self.closed = False
        self.ticks, self.totals, self.history = 0, RoutingTotals(), History()
        self.listener: Listener | None = None
        self._model = weakref.ref(model)
        self._agreed = plan
        """The plan to return to where a change of it is cut short."""
        self._ticking = CallLock("the control of a model's precision", WeakMethod(self._mend))
        self._monitor = HealthMonitor(str(device))
        self._failed_ticks, self._failure = 0, ""
        self.reserved = settings.kv_reserve if isinstance(settings.kv_reserve, int) else 0
        """Bytes of the budget that are kept for the KV cache."""
        self._excess = 0
        """Bytes above the budget that no upgrade can make up for."""
        slot_nbytes, exchange = codec.upgrade_layout.nbytes, exchange_for(device, codec.dtype)
        self.memory = DeviceMemory(
            plan.num_layers, plan.num_experts, plan.base.nbytes, slot_nbytes, plan.num_slots, device, base, exchange
        )
        self.steps, self.poller = StepCount(self.memory, settings.update_interval), Poller(self._look)
        with on_device(device):  # where memory is locked
            self.errors, store = loader.place(codec, self.memory.base, settings)
        try:
            copier = copier_for(device, slot_nbytes, staged=store.page_locked(0) is None)
        except BaseException:
            store.close()
            raise
        self.pipeline = SwapPipeline(self.memory.table, self.memory.pool, store, copier, BITS[plan.tiers[-1]])
        weakref.finalize(self, SwapPipeline.forget, self.pipeline)
        weakref.finalize(self, Poller.stop, self.poller)  # the later one goes first
        self.control = self._control_by(settings)
        try:
            self._fill()
        except BaseException:
            self.pipeline.close()
            raise

    @property
    def follows_replays(self) -> bool:
        """Whether precision goes on changing while the model is compiled and its CUDA graphs are replayed.

        On a GPU no Python runs then; on a CPU compiled code calls the layers' operators as a plain forward does.
        """
        return self.device.type == "cpu" or self.memory.follows_replays

    def ports(self, layer: int) -> LayerPorts:
        """What joins one layer's experts to the memory; the first layer's forward is where steps are counted."""
        return LayerPorts(layer, self.memory, self._on_forward if layer == 0 else None)

    def view(self, layer: int) -> LayerView:
        """What one layer's sparse block shows."""
        return LayerView(layer, WeakMethod(self._control_in_force), self.pipeline, self.plan.base.bits)

    @property
    def stored(self) -> StoredExperts:
        """Its experts where they lie; once closed, without those that wait on the host."""
        return StoredExperts(self.codec, self.memory.base, self.errors, None if self.closed else self.pipeline.store)

    def tick(self) -> bool:
        """One step of control, unless another one is at work or a CUDA graph is being captured; whether it ran."""
        self._check_open()
        return not is_capturing(self.device) and self._try_tick()

    def drain(self) -> None:
        """Wait for every copy in flight and publish it."""
        self._check_open()
        with self._ticking.turn():
            self.pipeline.drain()

    def freeze(self) -> None:
        """Publish what is in flight, then leave every expert at its precision."""
        with self._ticking.turn():
            self.pipeline.drain()
            self.frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._check_open()
        self.frozen, self._failure = False, ""

    def slots_within(self, budget: int, reserved: int) -> int:
        """Upgrade slots that `budget` leaves room for beside `reserved` bytes; a BudgetError if not even bases fit."""
        self._check_open()
        parts = self.nbytes()
        fixed = sum(parts.values()) - parts["upgrade"] + reserved
        if budget < fixed:
            cache = f", {reserved:,} bytes for the KV cache" if reserved else ""
            raise BudgetError(
                f"hbm_budget of {budget:,} bytes is too small: dense weights, workspace{cache} and every expert's "
                f"{self.plan.base.precision} base take {fixed:,}; give that much, "
                f"{'end other contexts or take shorter ones, ' if reserved else ''}or patch again with lower tiers",
                budget,
                fixed,
            )
        slot_nbytes = self.memory.pool.slot_nbytes
        return min(self.memory.table.kinds().size, (budget - fixed) // slot_nbytes) if slot_nbytes else 0

    @torch.inference_mode(False)  # what is allocated here outlives the caller's inference mode
    def set_budget(self, budget: int) -> None:
        """Shrink or grow the upgrade slab; the new ceiling holds when this returns."""
        with self._ticking.turn():
            num_slots = self.slots_within(budget, self.reserved)
            self._change_plan(replace(self.plan, budget=budget, num_slots=num_slots))
            self._excess = 0
            if not self.frozen:
                self._fill()

    @torch.inference_mode(False)  # as above
    def make_room(self, nbytes: int) -> None:
        """Keep `nbytes` of the budget free for the KV cache: upgrades give way at once, and may return at leisure.

        Slots come back a segment or more at a time, so that a context which ends and begins anew costs nothing.

        Raises:
            BudgetError: the bases alone leave less.
        """
        with self._ticking.turn():
            num_slots = self.slots_within(self.plan.budget, nbytes)
            if num_slots < self.pipeline.num_slots:
                self._change_plan(replace(self.plan, num_slots=num_slots))
            self.reserved = nbytes
            spare = num_slots - self.pipeline.num_slots
            if spare * LEAST_SEGMENTS >= num_slots > 0 < spare and not self.frozen:
                self._change_plan(replace(self.plan, num_slots=num_slots))
                self.control.refill(self.pipeline)

    @torch.inference_mode(False)  # as above
    def warm_start(self, hotness: np.ndarray, learned: LearnedKinds | None = None) -> None:
        """Take `hotness [L, E]` for what was observed and choose the upgrades anew, frozen or not; waits for them.

        Args:
            learned: the kinds of traffic that it is the average of, if they are known.
        """
        self._check_open()
        with self._ticking.turn():
            self.control.tracker.start_from(hotness, learned)
            if self.pipeline.allowance is None:  # else what is there is better than what may not come
                self.pipeline.keep(self.control.best_set(self.pipeline))
            self._fill()

    def refuse_from_within(self) -> None:
        """Raise a ReentryError if this is called from within its own control, by a policy, say."""
        self._ticking.refuse_from_within()

    def pin(self, layer: int, expert: int, pin: int) -> None:
        """Pin one expert, 1 to its upgrade and -1 to its base, or 0 for neither; waits for its copy.

        Raises:
            SettingsError: every slot that it could have is pinned to another.
        """
        self._check_open()
        with self._ticking.turn():
            self.control.pin((layer, expert), pin, self.pipeline)
            self.pipeline.drain()

    def set_policy(self, settings: Settings) -> None:
        """Decide as `settings` say from now on, with what was learned of the traffic and what is pinned."""
        self._check_open()
        control = self._control_by(settings)
        with self._ticking.turn():
            before = self.control
            control.tracker.start_from(before.tracker.average, before.tracker.learned)
            control.controller.pins = before.controller.pins
            self.settings, self.control = settings, control
            self.steps.update_interval = settings.update_interval

    def close(self) -> None:
        """Wait once for what is in flight, then stop for good. A second call finishes what one began."""
        with self._ticking.turn():
            self.frozen = self.closed = True
            self.pipeline.close()
        self.poller.stop()

    def nbytes(self) -> dict[str, int]:
        """Device bytes really allocated, by purpose."""
        model = self._model()
        held = () if model is None else (t for t in held_tensors(model) if t.device == self.device)
        return {"dense": weight_bytes(held), **self.memory.parts()}

    def health(self) -> Health:
        """How it is doing; see `Health`."""
        retries = self.pipeline.retries
        state, why = OK, ""
        if self.closed:
            state, why = STANDING_STILL, "the runtime was closed"
        elif self._failure:
            state, why = STANDING_STILL, self._failure
        elif retries.num_in_a_row > 1:
            state, why = STANDING_STILL, f"no upgrade can be copied, and one is tried now and then: {retries.last}"
        elif retries.num_suspect:
            state, why = DEGRADED, f"an upgrade could not be copied, and is tried again later: {retries.last}"
        elif self._excess:
            state = DEGRADED
            why = (
                f"{self._excess:,} bytes more are held than hbm_budget={self.plan.budget:,} allows, without any "
                "upgrade: dense weights were cast or added after patching; cast them back, or set_budget"
            )
        elif self.frozen or self.settings.policy == "frozen":
            why = "precision is frozen by choice"
        return self._monitor.look(
            state,
            why,
            self.closed,
            failed_copies=self.pipeline.counts.failed,
            suspect_experts=retries.num_suspect,
            failed_ticks=self._failed_ticks,
        )

    def upgraded(self) -> np.ndarray:
        """Experts with a published upgrade, bool `[L, E]`."""
        return self.memory.table.kinds() > 0

    def _control_in_force(self) -> ControlLoop:
        return self.control

    def _control_by(self, settings: Settings) -> ControlLoop:
        rate = bytes_per_second(settings.copy_rate_limit, self.device)
        gain = self.errors[..., 0] - self.errors[..., -1]
        limit = CopyRateLimiter(rate, self.memory.pool.slot_nbytes)
        return ControlLoop((self.plan.num_layers, self.plan.num_experts), gain, limit, settings)

    def _on_forward(self, tokens: int) -> None:
        if not is_capturing(self.device):
            self.steps.add()
            self._look(arrival() if self.control.tracker.knows_requests else None)
            self.steps.add_tokens(tokens)
        elif self.memory.follows_replays:
            self.poller.start()

    def _look(self, arrival: Arrival | None = None) -> int:
        """Tick if it is time, else let moves go on, from a forward or the poller; how many forwards there were so far.

        Args:
            arrival: requests that begin with the forward, which make it time unless ticks are failing.
        """
        if self.steps.is_due or (arrival is not None and self.steps.postponed == 1):
            try:
                self._try_tick(arrival)
            except Exception as error:  # whatever it is, generation goes on
                self._note_failure(error)
            else:
                self.steps.postpone(1)
        elif self.pipeline.num_in_flight:
            self._go_on()
        return self.steps.total

    @torch.inference_mode(False)  # as above
    def _go_on(self) -> None:
        """Publish what has arrived since the last tick, and copy what has got its slot."""
        try:
            with self._ticking.turn(wait=False) as taken:
                if taken and not self.closed:
                    self.pipeline.settle()
        except Exception as error:  # generation goes on, and the next tick, which does the same, says so
            logger.debug("moves wait for the next tick: %r", error)

    def _note_failure(self, error: Exception) -> None:
        """A tick has failed: one of a user's policy freezes precision, another is tried again, ever later."""
        self._failed_ticks += 1
        if not self._failure:
            logger.error("a tick has failed, and generation goes on", exc_info=error)
        if callable(self.settings.policy):
            self._failure = f"the policy failed ({error!r}); precision is frozen, see runtime.thaw()"
            self.frozen = True
        else:
            self._failure = f"a tick failed ({error!r}); it is tried again, after growing pauses"
            self.steps.postpone(min(2 * self.steps.postponed, LONGEST_PAUSE))
        self.health()

    @torch.inference_mode(False)  # as above
    def _try_tick(self, arrival: Arrival | None = None) -> bool:
        with self._ticking.turn(wait=False) as taken:
            if not taken or self.closed:
                return False
            self._tick(arrival)
            return True

    def _tick(self, arrival: Arrival | None) -> None:
        """One tick: what was routed since the last one, what begins now, and what that decides."""
        if self.ticks % CEILING_INTERVAL == 0:
            self._keep_ceiling()
        self.ticks += 1
        upgraded, steps = self.upgraded(), self.steps.take()
        mass, tokens = self.memory.counter.drain()
        window = Window(mass, tokens, steps, self.memory.counter.top_k, upgraded)
        self.totals.add(window)
        if self.listener is not None:
            self.listener(window)
        begun = self.control.step(window, self.pipeline, self.frozen, arrival)
        hotness = self.control.tracker.expected
        self.history.add(window, begun, hotness, self.control.controller.score(hotness))
        if not self.frozen:
            self._failure = ""
        self.health()

    def _keep_ceiling(self) -> None:
        """Give up upgrades where dense weights have grown since (casts by a trainer, adapters)."""
        excess = sum(self.nbytes().values()) + self.reserved - self.plan.budget
        if excess <= 0:
            self._excess = 0
            return
        slot_nbytes = self.memory.pool.slot_nbytes
        given_up = min(self.pipeline.num_slots, -(-excess // slot_nbytes)) if slot_nbytes else 0
        self._excess = max(0, excess - given_up * slot_nbytes)
        if given_up:
            logger.warning(
                "the dense weights have grown since the model was patched: %d upgrades are given up to keep "
                "hbm_budget=%s; set_budget gets them back", given_up, f"{self.plan.budget:,}",
            )  # fmt: skip
            self._change_plan(replace(self.plan, num_slots=self.pipeline.num_slots - given_up))

    def _change_plan(self, plan: MemoryPlan) -> None:
        if plan.budget > self.plan.budget:
            self.plan = plan  # the ceiling rises before the bytes do, and falls after them
        self._resize(plan.num_slots)
        self.plan = self._agreed = plan

    def _resize(self, num_slots: int) -> None:
        self.pipeline.resize(num_slots, self.control.controller.ranked(self.control.tracker.expected))

    @torch.inference_mode(False)  # as above
    def _mend(self) -> None:
        """Put in order what a call has left behind that was cut short; a change of the budget is undone."""
        self.pipeline.mend()
        if self.closed:
            return
        try:
            self._resize(self._agreed.num_slots)
        except (MemoryError, OSError, torch.OutOfMemoryError):
            # What was given back a moment ago is another's now.
            self._agreed = replace(self._agreed, num_slots=self.pipeline.num_slots)
        self.plan = self._agreed

    def _fill(self) -> None:
        self.control.fill(self.pipeline)
        self.pipeline.drain()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this runtime was closed; patch the model again to manage its precision")
