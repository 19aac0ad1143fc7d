"""Who deserves precision, and whether that pays: budget, hotness, rules, moves, verdict. No torch, no state."""

from dynaexq.policy.budget import LADDERS, plan_memory, predicted_loss
from dynaexq.policy.hotness import decay_by_tokens, prior_hotness, update_hotness
from dynaexq.policy.precision import slots_per_row, threshold, top_n, transitions
from dynaexq.policy.worth import Average, Stance, Verdict, is_worth_it, lift

__all__ = [
    "LADDERS",
    "Average",
    "Stance",
    "Verdict",
    "decay_by_tokens",
    "is_worth_it",
    "lift",
    "plan_memory",
    "predicted_loss",
    "prior_hotness",
    "slots_per_row",
    "threshold",
    "top_n",
    "transitions",
    "update_hotness",
]
