"""Which tiles the two products of a layer take, for few pairs an expert or many. It knows sizes and launches nothing.

The sizes follow from what the compiler makes of them (docs/decisions/0006): no register is spilled on any
architecture, and unpacking is not repeated in a second group of warps. `benchmarks/gpu/gpu.py` times them.
"""

from functools import lru_cache
from typing import NamedTuple

from dynaexq.kernels.triton.specs import Matrix, Tiling

SINGLE_PAIRS = 64
"""Pairs in all up to which tiles are halved: one token's experts would not give every multiprocessor a tile."""

FEW_PAIRS = 32
"""Pairs an expert, on average over all experts, up to which they count as few: tokens of decoding, mostly."""

COLUMNS = 64  # of 16-bit weights at a time


class Launch(NamedTuple):
    """One launch of the kernel."""

    tiling: Tiling
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """The launches of one layer; those of a product meet every expert once between them."""

    block_m: int
    up: tuple[Launch, ...]
    down: tuple[Launch, ...]


def plan_for(num_pairs: int, num_experts: int, up: Matrix, down: Matrix, swiglu: bool) -> Plan:
    """Tiles for so many pairs; with `swiglu`, the first product ends in silu(gate) * up."""
    if num_pairs <= SINGLE_PAIRS:
        return few_pairs(up, down, swiglu, 64)
    if num_pairs <= FEW_PAIRS * num_experts:
        return few_pairs(up, down, swiglu, 128)
    return many_pairs(up, down, swiglu)


def plan_for_linear(num_rows: int, matrix: Matrix) -> tuple[int, tuple[Launch, ...]]:
    """Rows of a block and the launches of one matrix, which every row meets."""
    plan = plan_for(num_rows, 1, matrix, matrix, swiglu=False)
    return plan.block_m, plan.up


@lru_cache(maxsize=256)
def few_pairs(up: Matrix, down: Matrix, swiglu: bool, block_n: int) -> Plan:
    """Products are scaled, group by group; all tiers in one launch, told apart by a branch that a tile takes whole."""
    block_m = 16
    next_sum_width = min(down.group, block_n // 2) if swiglu and down.base != 16 else 0
    sum_widths = [0 if matrix.base == 16 else matrix.group for matrix in (up, down)]
    first = Tiling(block_m, block_n, COLUMNS, "all", swiglu, False, sum_widths[0], next_sum_width)
    second = Tiling(block_m, block_n, COLUMNS, "all", False, False, next_sum_width or sum_widths[1], 0)
    return Plan(block_m, (Launch(first, 4, 2),), (Launch(second, 4, 2),))


@lru_cache(maxsize=256)
def many_pairs(up: Matrix, down: Matrix, swiglu: bool) -> Plan:
    """Weights are scaled, so that products add up; a launch a tier, whose registers need not hold the other's."""
    block_m, block_n = 64, 128
    tiers = ("base", "upgraded") if up.upgrade else ("all",)
    first, second = (
        tuple(Launch(Tiling(block_m, block_n, COLUMNS, tier, last, True, 0, 0), 8, 2) for tier in tiers)
        for last in (swiglu, False)
    )
    return Plan(block_m, first, second)
