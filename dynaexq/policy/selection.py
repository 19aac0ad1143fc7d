"""Who deserves the upgrade: sets of experts, and the moves from one set to the next. Pure functions over numpy.

Shapes: L layers, E experts per layer; `score[l, e] = hotness * gain`, where the gain is the error that the upgrade
removes. `upgraded [L, E]` marks experts that hold an upgrade or have one on its way. A rule returns `wanted [L, E]`,
never more than there are slots; `transitions` turns the difference into moves. The same input gives the same output,
ties going to the incumbent, then to the lower index.
"""

import numpy as np

from dynaexq.types import Transition


def top_n(score: np.ndarray, upgraded: np.ndarray, slots: np.ndarray, hysteresis: float) -> np.ndarray:
    """The `slots[r]` best of every row r; an incumbent counts for `1 + hysteresis` times its score.

    Args:
        score, upgraded: `[R, E]`. One row competes by itself: reshape to `[1, L * E]` for global allocation.
        slots: `[R]`, how many each row may choose.
    """
    worth = np.where(upgraded, score * (1 + hysteresis), score)
    ascending = np.sort(worth, axis=1)
    num_experts = worth.shape[1]
    last = ascending[np.arange(len(worth)), np.clip(num_experts - slots, 0, num_experts - 1)][:, None]
    better, tied = worth > last, worth == last
    left = slots[:, None] - better.sum(1, keepdims=True)  # how many of those that tie for the last slot get one
    incumbents = _first_of_each(tied & upgraded, left)
    newcomers = _first_of_each(tied & ~upgraded, left - incumbents.sum(1, keepdims=True))
    return better | incumbents | newcomers


def _first_of_each(marked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first `counts[r]` of the True in every row r."""
    return marked & (np.cumsum(marked, axis=1) <= counts)


def threshold(
    score: np.ndarray, upgraded: np.ndarray, slots: np.ndarray, hotness: np.ndarray, tau_h: float, tau_c: float
) -> np.ndarray:
    """The paper's first rule: hotter than `tau_h` comes in, incumbents stay until colder than `tau_c`.

    Where more qualify than a row has slots, the best by score are taken, incumbents first among equals.
    """
    qualified = (hotness > tau_h) | (upgraded & (hotness >= tau_c))
    return top_n(np.where(qualified, score, -1.0), upgraded & qualified, slots, 0.0) & qualified


def slots_per_row(allocation: str, slots: int, num_layers: int) -> np.ndarray:
    """Slots of each row that competes by itself: all in one for `"global"`, equal shares for `"per_layer"`.

    >>> slots_per_row("per_layer", 7, 3)
    array([3, 2, 2])
    """
    if allocation == "global":
        return np.array([slots])
    return slots // num_layers + (np.arange(num_layers) < slots % num_layers)


def transitions(
    score: np.ndarray, upgraded: np.ndarray, wanted: np.ndarray, free_slots: int | np.ndarray, max_promotions: int
) -> list[Transition]:
    """The moves of one tick: the best missing experts, and just as many demotions as those still need slots.

    An expert that is no longer wanted keeps its upgrade until another expert needs the slot: an idle slot serves none.

    Args:
        free_slots: slots that are free, or will be once their last reader has finished: one figure where all layers
            share them, `[L]` where each has its own, so that no layer takes from another even for a tick.
        max_promotions: what the traffic limit allows in this tick.
    """
    if np.array_equal(wanted, upgraded):
        return []
    free = np.atleast_1d(free_slots)
    row_size = score.size // len(free)
    flat_score = score.ravel()
    missing = np.flatnonzero(wanted & ~upgraded)
    unwanted = np.flatnonzero(upgraded & ~wanted)
    promoted = missing[np.argsort(-flat_score[missing], kind="stable")][:max_promotions]
    demoted = unwanted[np.argsort(flat_score[unwanted], kind="stable")]
    demoted = _first_of_rows(demoted, row_size, _count(promoted, row_size, len(free)) - free)
    promoted = _first_of_rows(promoted, row_size, free + _count(demoted, row_size, len(free)))
    num_experts = score.shape[1]
    moves = [(int(i), False) for i in demoted] + [(int(i), True) for i in promoted]
    return [Transition(index // num_experts, index % num_experts, promote) for index, promote in moves]


def _count(indices: np.ndarray, row_size: int, num_rows: int) -> np.ndarray:
    """How many flat `indices` lie in each row."""
    return np.bincount(indices // row_size, minlength=num_rows)


def _first_of_rows(indices: np.ndarray, row_size: int, counts: np.ndarray) -> np.ndarray:
    """The first `counts[r]` of the flat `indices` that lie in row r, in their order."""
    rows = indices // row_size
    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], rows[order])
    chosen = order[np.arange(len(order)) - starts < counts[rows[order]]]
    return indices[np.sort(chosen)]
