"""Who deserves precision: hotness, rules, moves, the loop that joins them, and whether it pays. Numpy only."""

from dynaexq.policy.benefit import Average, Stance, Verdict, is_worth_it, lift
from dynaexq.policy.hotness import decay_by_tokens, prior_hotness, update_hotness
from dynaexq.policy.selection import slots_per_row, threshold, top_n, transitions

__all__ = [
    "Average",
    "Stance",
    "Verdict",
    "decay_by_tokens",
    "is_worth_it",
    "lift",
    "prior_hotness",
    "slots_per_row",
    "threshold",
    "top_n",
    "transitions",
    "update_hotness",
]
