"""Numbers as people write them, and rows squeezed into fewer cells. Shared by the views."""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size(nbytes: int) -> str:
    """Bytes in the largest binary unit that they fill, to three digits.

    >>> size(21474836480), size(402653184), size(1536), size(12)
    ('20.0 GiB', '384 MiB', '1.50 KiB', '12 B')
    """
    for unit, factor in _UNITS:
        if nbytes >= factor:
            amount = nbytes / factor
            return f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f} {unit}"
    return f"{nbytes} B"


def clock(at: float) -> str:
    """Seconds since the epoch as the time of day here."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def squeezed(row: Sequence[float], cells: int) -> list[float]:
    """Means of neighbors, so that at most `cells` are left.

    >>> squeezed([1, 3, 5, 7, 9], 2)
    [2.0, 7.0]
    """
    if len(row) <= cells:
        return [float(value) for value in row]
    edges = [index * len(row) // cells for index in range(cells + 1)]
    return [sum(row[a:b]) / (b - a) for a, b in pairwise(edges)]


def squeezed_rows(rows: Sequence[Sequence[float]], most: int, cells: int) -> list[list[float]]:
    """The same of the rows, and of the columns in each."""
    if len(rows) > most:
        edges = [index * len(rows) // most for index in range(most + 1)]
        groups = [rows[a:b] for a, b in pairwise(edges)]
        rows = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return [squeezed(row, cells) for row in rows]


def upgraded(snapshot: dict[str, Any]) -> list[list[float]]:
    """1 for each expert above the base, else 0, `[L, E]`."""
    base = min(snapshot["tier_bits"])
    return [[float(bits > base) for bits in row] for row in snapshot["bits"]]


def relative_hotness(snapshot: dict[str, Any]) -> list[list[float]]:
    """Hotness as shares of each layer's hottest expert, `[L, E]`."""
    return [[value / (max(row) or 1.0) for value in row] for row in snapshot["hotness"]]


def moves_in_words(snapshot: dict[str, Any], most: int) -> list[tuple[str, str, str]]:
    """Time, what moved, and why, of the latest moves."""
    names, upgrade, base = snapshot["layers"], snapshot["tiers"][-1], snapshot["tiers"][0]
    found = []
    for move in reversed(snapshot["moves"][-most:]):
        to = upgrade if move["promote"] else base
        what = f"{names[move['layer']]}, expert {move['expert']}, to {to}"
        found.append((clock(move["at"]), what, f"expected hotness {move['hotness']:.4f}, score {move['score']:.2g}"))
    return found


def figures(snapshot: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The figures by section: name, and value in words."""
    memory, stats = snapshot["memory"], snapshot["stats"]
    counts = Counter(bits for row in snapshot["bits"] for bits in row)
    shown = {name: f"{value:,}" for name, value in stats.items() if isinstance(value, int)}
    shown |= {name: value for name, value in stats.items() if isinstance(value, str)}
    shown["bytes_copied"], shown["host_bytes"] = size(stats["bytes_copied"]), size(stats["host_bytes"])
    shown["hot_coverage"] = f"{stats['hot_coverage']:.1%}"
    return [
        ("memory", [(part, size(nbytes)) for part, nbytes in memory.items()]),
        ("precision", [(f"experts at {bits} bits", f"{count:,}") for bits, count in sorted(counts.items())]),
        ("since the start", [(name.replace("_", " "), value) for name, value in shown.items()]),
    ]
