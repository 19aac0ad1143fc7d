"""Which tiles suit this card: a layer of experts timed with others than `tuning` has for it.

What is fastest in each respect is what `dynaexq.kernels.triton.tuning.multiprocessor` should say of the card.
"""

import itertools
import statistics
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from clock import duration
from gpu_layers import MIXES, Shape, build, must_agree, routings, source_experts

TUNED = ("int4", "20 % int4 over int2", "20 % fp16 over int4")


def run(shape: Shape, tokens: tuple[int, ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each candidate, the fastest last: microseconds by tokens, and their geometric mean over all mixes.

    Raises:
        AssertionError: one of them gives another answer than the reference.
    """
    from dynaexq.kernels.triton import tuning

    source = source_experts(shape, device)
    mixes = {name: build(shape, *MIXES[name], source) for name in TUNED}
    arguments = {count: routings(shape, count, device) for count in tokens}
    own, rows = tuning.multiprocessor_of(device), []
    for candidate in [own, *candidates(own)]:
        with patch.object(tuning, "multiprocessor_of", lambda _, candidate=candidate: candidate):
            times = {}
            for (name, mix), count in itertools.product(mixes.items(), tokens):
                must_agree(mix, arguments[count][0], f"{candidate}, {name}, {count} tokens")
                microseconds, _ = duration(
                    lambda mix=mix, count=count: [mix.run(*a) for a in arguments[count]], device
                )
                times[name, count] = microseconds / len(arguments[count])
        rows.append(_row(candidate, times, tokens))
    yield from sorted(rows, key=lambda row: -row["geometric_mean"])


def candidates(own: Any) -> list[Any]:
    """Other tiles, in one respect each: all of them together would take an hour to compile."""
    others = {"single_rows": (32, 64), "few_rows": (32, 64, 128), "least_pairs": (8, 16), "stages": (2, 3, 4)}
    found = [own._replace(**{name: value}) for name, values in others.items() for value in values]
    return [candidate for candidate in found if candidate != own]


def _row(candidate: Any, times: dict[tuple[str, int], float], tokens: tuple[int, ...]) -> dict[str, Any]:
    by_tokens = {
        f"{count} tokens": statistics.geometric_mean(time for (_, other), time in times.items() if other == count)
        for count in tokens
    }
    fields = {name: value for name, value in candidate._asdict().items() if name != "takes_int2"}
    return {**fields, **by_tokens, "geometric_mean": statistics.geometric_mean(times.values())}
