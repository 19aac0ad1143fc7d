"""How a byte budget is spent: which ladder of tiers, how many upgrade slots. Pure arithmetic, before a byte moves.

`tiers="auto"` takes the ladder with the least predicted loss. The prediction combines two measured tables: the loss
of a model whose experts all have one precision, and the share of the gap between base and upgrade that a given share
of upgraded experts recovers.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from dynaexq.errors import BudgetError
from dynaexq.types import MemoryPlan, Tier

Ladder = tuple[Tier, Tier | None]

LOSS = {"fp16": 0.0, "int8": 0.0009, "int4": 0.0108, "int2": 0.130}
"""KL divergence from the 16-bit model, nats a token, all experts at one precision (benchmarks/precision_table.py on
the embedded model)."""

SHARED_LOSS = {("int2", "int4"): 0.162, ("int2", "int8"): 0.170}
"""The same with a code that can be refined: its 2-bit reading costs more than a code fitted for two bits alone."""

_SHARE_UPGRADED = (0.0, 0.1, 0.2, 0.33, 0.5, 1.0)
_SHARE_RECOVERED = (0.0, 0.37, 0.56, 0.69, 0.83, 1.0)

TIER_CHOICES = (
    ("int2",),
    ("int2", "int4"),
    ("int2", "int8"),
    ("int4",),
    ("int4", "int8"),
    ("int4", "fp16"),
    ("int8",),
    ("int8", "fp16"),
    ("fp16",),
)
"""What `tiers="auto"` chooses from. Not ("int2", "fp16"): the same bytes as planes serve three times the experts."""


RESERVED_SHARE = 0.1
"""Of the memory at hand, kept for allocator rounding and everybody else."""


def predicted_loss(base: str, upgrade: str | None, share_upgraded: float) -> float:
    """Predicted KL, nats a token, of a model with `share_upgraded` of its experts at `upgrade`, the rest at `base`."""
    if upgrade is None:
        return LOSS[base]
    floor = SHARED_LOSS.get((base, upgrade), LOSS[base])
    recovered = float(np.interp(share_upgraded, _SHARE_UPGRADED, _SHARE_RECOVERED))
    return (1 - recovered) * floor + recovered * LOSS[upgrade]


def plan_memory(
    ladders: Iterable[Ladder],
    num_layers: int,
    num_experts: int,
    dense: int,
    workspace: int,
    budget: int,
    alternatives: Iterable[Ladder] = (),
) -> MemoryPlan:
    """The plan with the least predicted loss among `ladders`; ties go to the fewer bytes, then to a single tier.

    Args:
        ladders: (base, upgrade or None) with the bytes of a block and of a slot.
        dense: bytes of all weights that are not experts.
        workspace: bytes of tables, counters and kernel workspace.
        alternatives: further ladders, named in the error when one of them would fit.

    Raises:
        BudgetError: not even the base of any ladder fits; names the least budget that does, and the remedy.
    """
    ladders = list(ladders)
    fixed = dense + workspace
    experts = num_layers * num_experts
    fitting = fitting_plans(ladders, num_layers, num_experts, dense, workspace, budget)
    if not fitting:
        least, base = min((fixed + experts * base.nbytes, base.precision) for base, _ in ladders)
        others = [(fixed + experts * base.nbytes, base.precision) for base, _ in alternatives]
        smaller = [precision for needed, precision in sorted(others) if needed <= budget]
        remedy = f', or take tiers=("{smaller[-1]}",), which fits' if smaller else ""
        raise BudgetError(
            f"hbm_budget of {budget:,} bytes is too small: {dense:,} of dense weights, {workspace:,} of workspace and "
            f"{experts:,} experts at {base} need {least:,}; raise hbm_budget to at least {least}{remedy}",
            budget,
            least,
        )
    return fitting[0]


def fitting_plans(
    ladders: Iterable[Ladder], num_layers: int, num_experts: int, dense: int, workspace: int, budget: int
) -> list[MemoryPlan]:
    """One plan for each of `ladders` whose base fits, the best first; arguments as those of `plan_memory`."""
    plans = (_filled(ladder, num_layers, num_experts, dense, workspace, budget) for ladder in ladders)
    fitting = [plan for plan in plans if plan is not None]
    return sorted(fitting, key=lambda plan: (loss_of(plan), plan.total, len(plan.tiers)))


def loss_of(plan: MemoryPlan) -> float:
    """`predicted_loss` of a plan."""
    upgrade = plan.upgrade.precision if plan.upgrade else None
    return predicted_loss(plan.base.precision, upgrade, plan.share_upgraded)


def weights_budget(available: int, context: int) -> int:
    """Bytes that weights may take of `available`, beside `context` bytes of cache and activations; may be negative."""
    return available - int(RESERVED_SHARE * available) - context


def least_available(budget: int, context: int) -> int:
    """The least memory of which `weights_budget` leaves `budget`."""
    available = max(0, int((budget + context) / (1 - RESERVED_SHARE)) - 2)
    while weights_budget(available, context) < budget:
        available += 1
    return available


def _filled(
    ladder: Ladder, num_layers: int, num_experts: int, dense: int, workspace: int, budget: int
) -> MemoryPlan | None:
    base, upgrade = ladder
    plan = MemoryPlan(budget, dense, workspace, num_layers, num_experts, base, upgrade, num_slots=0)
    if plan.total > budget:
        return None
    if upgrade is None:
        return plan
    slots = min(num_layers * num_experts, (budget - plan.total) // upgrade.nbytes)
    return replace(plan, num_slots=slots)
