"""How a byte budget is spent: which tiers, how many upgrade slots. Arithmetic only, before a byte is copied.

`tiers="auto"` takes the tiers with the least predicted loss. The prediction combines two measured tables: the loss of
a model whose experts all have one precision, and the share of the gap between base and upgrade that a given share of
upgraded experts recovers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dynaexq.errors import BudgetError
from dynaexq.types import MemoryPlan, Tier

TierPair = tuple[Tier, Tier | None]
"""Base and upgrade with the bytes of a block and of a slot; no upgrade for a single tier."""

LOSS = {"fp16": 0.0, "int8": 0.0007, "int6": 0.0018, "int4": 0.0109, "int3": 0.0384, "int2": 0.132}
"""KL divergence from the 16-bit model in nats per token, all experts at one precision: measured on the embedded model
by `python benchmarks/quality/precision_table.py`."""

SHARED_LOSS = {
    ("int2", "int3"): 0.164,
    ("int2", "int4"): 0.163,
    ("int2", "int8"): 0.169,
    ("int3", "int4"): 0.0406,
}
"""The same for a code that can be refined: read at 2 bits it loses more than a code fitted for 2 bits alone."""

DENSE_LOSS: dict[str | None, float] = {None: 0.0, "int8": 0.0001, "int6": 0.0014, "int4": 0.0113}
"""What packing the dense layers adds beside int4 experts, measured by `python benchmarks/quality/dense.py`; its keys
are what `dense="auto"` chooses from."""

_SHARE_UPGRADED = (0.0, 0.1, 0.2, 0.33, 0.5, 1.0)
_SHARE_RECOVERED = (0.0, 0.39, 0.55, 0.70, 0.84, 1.0)

TIER_CHOICES = (
    ("int2",),
    ("int2", "int3"),
    ("int2", "int4"),
    ("int2", "int8"),
    ("int3",),
    ("int3", "int4"),
    ("int4",),
    ("int4", "int6"),
    ("int4", "int8"),
    ("int4", "fp16"),
    ("int6",),
    ("int8",),
    ("int8", "fp16"),
    ("fp16",),
)
"""What `tiers="auto"` chooses from. Not ("int2", "fp16") and its like: the same bytes as planes serve three times the
experts."""

RESERVED_SHARE = 0.1
"""Of the memory at hand, kept for rounding by the allocator and for other programs."""


@dataclass(frozen=True)
class ModelSpec:
    """What planning knows of a model, or of its share on one device. Bytes unless the name says otherwise.

    Qwen3-30B-A3B in bfloat16 has 48 layers of 128 experts of 4,718,592 weights; `experts` is 57,982,058,496 and
    `dense` 3,086,073,600.

    Attributes:
        name: of the model, as people know it.
        dtype: of its experts, such as `"bfloat16"`.
        num_experts: per layer.
        experts, num_weights: all experts in the model's own dtype, and how many weights they have.
        dense: all weights and buffers that are not experts, as they will be held.
        workspace: tables and counters on the device.
        choices: the tiers that may be chosen: those that were asked for, or all for `tiers="auto"`.
        offered: all tiers that the experts can be had at.
        quantizer: `"als"` or `"rtn"`.
        cache, activations: what the context takes; 0 where that was not asked for.
        packed: whether the experts come from a packed checkpoint, and need no quantizing.
        index: what the checkpoint's index says all weights take; None without an index.
        experts_per_token: in each layer; 0 where that is not known.
        gathered: of `dense`, the tables of which a token reads a row, such as an embedding.
    """

    name: str
    dtype: str
    num_layers: int
    num_experts: int
    experts: int
    num_weights: int
    dense: int
    workspace: int
    choices: tuple[TierPair, ...]
    offered: tuple[TierPair, ...]
    quantizer: str
    cache: int = 0
    activations: int = 0
    packed: bool = False
    index: int | None = None
    experts_per_token: int = 0
    gathered: int = 0

    @property
    def context(self) -> int:
        """Bytes of cache and activations."""
        return self.cache + self.activations

    def weights(self, base: Tier) -> int:
        """The least bytes of all weights with every expert at `base`."""
        return self.dense + self.workspace + self.num_layers * self.num_experts * base.nbytes

    def least(self) -> tuple[int, str]:
        """The least bytes of all weights at any of `choices`, and the precision that all experts have there."""
        return min((self.weights(base), base.precision) for base, _ in self.choices)

    def read_by_token(self, plan: MemoryPlan) -> tuple[int, int] | None:
        """Bytes of weights that one token reads: with none of its experts upgraded, and with all.

        None where it is not known how many it has.
        """
        if not self.experts_per_token:
            return None
        others, routed = plan.dense - self.gathered, self.num_layers * self.experts_per_token
        upgraded = plan.base.nbytes
        if plan.upgrade is not None:
            upgraded = plan.upgrade.nbytes + (0 if plan.upgrade.precision == "fp16" else plan.base.nbytes)
        return others + routed * plan.base.nbytes, others + routed * upgraded

    def waits_in_ram(self, host_copy: str = "auto") -> bool:
        """Whether upgrades are copied into RAM; of a packed checkpoint they are read where they are, unless asked."""
        return host_copy == "ram" or (host_copy == "auto" and not self.packed)

    def waiting(self, pair: TierPair) -> int:
        """Bytes of the upgrades of all experts, where they wait for their turn."""
        _, upgrade = pair
        return self.num_layers * self.num_experts * upgrade.nbytes if upgrade else 0


def tier_choices(tiers: str | tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The tiers to choose from: those that were asked for, or all for `"auto"`."""
    return TIER_CHOICES if isinstance(tiers, str) else (tiers,)


def plan_memory(spec: ModelSpec, budget: int) -> MemoryPlan:
    """The plan with the least predicted loss among `spec.choices`; ties go to fewer bytes, then to a single tier.

    Raises:
        BudgetError: not even the base of any choice fits; names the least budget that does, and the remedy.
    """
    fitting = fitting_plans(spec, dict.fromkeys(spec.choices, budget))
    if fitting:
        return fitting[0]
    least, base = spec.least()
    others = sorted((spec.weights(base), base.precision) for base, _ in spec.offered)
    smaller = [precision for needed, precision in others if needed <= budget]
    remedy = f', or take tiers=("{smaller[-1]}",), which fits' if smaller else ""
    wide = " in float32 (dtype=torch.bfloat16 takes half)" if spec.dtype == "float32" else ""
    in_gib = f" ({least / 2**30:.1f} GiB)" if least >= 2**30 else ""
    raise BudgetError(
        f"hbm_budget of {budget:,} bytes is too small: {spec.dense:,} of dense weights{wide}, {spec.workspace:,} "
        f"of workspace and {spec.num_layers * spec.num_experts:,} experts at {base} need {least:,}"
        f"{in_gib}; raise hbm_budget to at least {least}{remedy}",
        budget,
        least,
    )


def plan_within(spec: ModelSpec, available: int, waits_here: bool = False) -> MemoryPlan:
    """The same in `available` bytes of memory, less a reserve, the context, and the upgrades that wait there.

    Args:
        waits_here: whether upgrades wait for their turn in the same memory, as they do on a CPU.

    Raises:
        BudgetError: nothing fits.
    """
    fitting = fitting_plans(spec, budgets_within(spec, spec.choices, available, waits_here))
    if fitting:
        return fitting[0]
    budget = weights_budget(available, spec.context)
    plan = plan_memory(spec, budget)  # where this fits, it is what waits that does not
    waiting = spec.waiting((plan.base, plan.upgrade))
    raise BudgetError(
        f"{available:,} bytes leave {budget:,} for weights, and at {plan.tiers} {waiting:,} of upgrades would wait in "
        f'the same memory; set host_copy="disk", or take tiers=("{plan.base.precision}",)',
        available,
        spec.weights(plan.base) + waiting,
    )


def budgets_within(
    spec: ModelSpec, pairs: Iterable[TierPair], available: int, waits_here: bool
) -> dict[TierPair, int]:
    """What of `available` bytes weights may take, by pair of tiers; see `plan_within`."""
    return {
        pair: weights_budget(available - (spec.waiting(pair) if waits_here else 0), spec.context) for pair in pairs
    }


def fitting_plans(spec: ModelSpec, budgets: Mapping[TierPair, int]) -> list[MemoryPlan]:
    """One plan for each pair of tiers whose base fits its budget, the best first."""
    plans = (_filled(spec, pair, budget) for pair, budget in budgets.items())
    fitting = [plan for plan in plans if plan is not None]
    return sorted(fitting, key=lambda plan: (loss_of(plan), plan.total, len(plan.tiers)))


def loss_of(plan: MemoryPlan) -> float:
    """`predicted_loss` of a plan."""
    upgrade = plan.upgrade.precision if plan.upgrade else None
    return predicted_loss(plan.base.precision, upgrade, plan.share_upgraded)


def least_loss(plans: Mapping[str | None, MemoryPlan]) -> str | None:
    """Which of the formats of dense layers has the plan with the least predicted loss, theirs included."""
    return min(plans, key=lambda dense: (loss_of(plans[dense]) + DENSE_LOSS[dense], plans[dense].total))


def predicted_loss(base: str, upgrade: str | None, share_upgraded: float) -> float:
    """Predicted KL in nats per token, with `share_upgraded` of the experts at `upgrade` and the rest at `base`."""
    if upgrade is None:
        return LOSS[base]
    floor = SHARED_LOSS.get((base, upgrade), LOSS[base])
    recovered = float(np.interp(share_upgraded, _SHARE_UPGRADED, _SHARE_RECOVERED))
    return (1 - recovered) * floor + recovered * LOSS[upgrade]


def weights_budget(available: int, context: int) -> int:
    """Bytes that weights may take of `available`, beside `context` bytes of cache and activations; may be negative."""
    return available - int(RESERVED_SHARE * available) - context


def least_available(budget: int, context: int) -> int:
    """The least memory of which `weights_budget` leaves `budget`."""
    available = max(0, int((budget + context) / (1 - RESERVED_SHARE)) - 2)
    while weights_budget(available, context) < budget:
        available += 1
    return available


def _filled(spec: ModelSpec, pair: TierPair, budget: int) -> MemoryPlan | None:
    base, upgrade = pair
    sizes = (spec.dense, spec.workspace, spec.num_layers, spec.num_experts)
    plan = MemoryPlan(budget, *sizes, base, upgrade, num_slots=0)
    return None if plan.total > budget else plan.filled(budget)
