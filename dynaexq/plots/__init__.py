"""Pictures by matplotlib, of what a runtime shows and of what benchmarks measure.

Each function returns a figure, which a notebook shows and `figure.savefig(path)` writes. Colors remain apart for
color-blind readers, and markers and shades do without color.

Examples:
    >>> from dynaexq import plots
    >>> plots.hotness_map(model.dynaexq.snapshot())  # doctest: +SKIP
"""

from dynaexq.plots.measurements import accuracy, activation, by_batch, choices, kl_by_bits, quality_by_share, timeline
from dynaexq.plots.snapshots import coverage, hotness_map, precision_map, precision_over_time

__all__ = [
    "accuracy",
    "activation",
    "by_batch",
    "choices",
    "coverage",
    "hotness_map",
    "kl_by_bits",
    "precision_map",
    "precision_over_time",
    "quality_by_share",
    "timeline",
]
