"""Who deserves precision, and whether that pays: budget, hotness, rules, moves, verdict. No torch, no state."""

from dynaexq.policy.budget import (
    LADDERS,
    RESERVED_SHARE,
    fitting_plans,
    least_available,
    loss_of,
    plan_memory,
    predicted_loss,
    weights_budget,
)
from dynaexq.policy.hotness import decay_by_tokens, prior_hotness, update_hotness
from dynaexq.policy.precision import slots_per_row, threshold, top_n, transitions
from dynaexq.policy.worth import Average, Stance, Verdict, is_worth_it, lift

__all__ = [
    "LADDERS",
    "RESERVED_SHARE",
    "Average",
    "Stance",
    "Verdict",
    "decay_by_tokens",
    "fitting_plans",
    "is_worth_it",
    "least_available",
    "lift",
    "loss_of",
    "plan_memory",
    "predicted_loss",
    "prior_hotness",
    "slots_per_row",
    "threshold",
    "top_n",
    "transitions",
    "update_hotness",
    "weights_budget",
]
