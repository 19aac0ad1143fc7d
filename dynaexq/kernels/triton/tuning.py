"""Which tiles the two products of a layer take, for few pairs an expert or many. It knows sizes and launches nothing.

The sizes follow from what the compiler makes of them (docs/decisions/0006): no register is spilled on any
architecture, loads overlap, and unpacking is not repeated in a second group of warps. `benchmarks/gpu/gpu.py` times
them.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton

from dynaexq.kernels.triton.specs import Matrix, Tiling

SINGLE_PAIRS = 64
"""Pairs in all up to which tiles are halved: one token's experts would not give every multiprocessor a tile."""

FEW_PAIRS = 32
"""Pairs an expert, on average over all experts, up to which they count as few: tokens of decoding, mostly."""

STAGES, STAGES_OF_MANY = 3, 2
"""One block is multiplied while the next two are on their way; with two, each is waited for once it is asked for. For
more than that the tiles of many pairs have no shared memory on most cards."""

ROOMY = {(8, 0), (8, 7), (9, 0)}
"""Compute capabilities with 163 KiB of shared memory or more, where others have 99: several of the wider tiles for few
pairs fit their multiprocessors, and one the others'. On 10.0, which has as much, the wider ones spill registers."""

NARROW_AMD = ("gfx10", "gfx11", "gfx12")
"""AMD's architectures of 32 lanes, whose 256 registers a lane hold half the tile of the others."""

COLUMNS = 64  # of 16-bit weights at a time


class Launch(NamedTuple):
    """One launch of the kernel."""

    tiling: Tiling
    num_warps: int


class Plan(NamedTuple):
    """The launches of one layer; those of a product meet every expert once between them."""

    block_m: int
    up: tuple[Launch, ...]
    down: tuple[Launch, ...]


class Multiprocessor(NamedTuple):
    """What tiles depend on of a GPU. `benchmarks/gpu/gpu.py tune` times others on the card at hand.

    Attributes:
        single_rows, few_rows: weight rows of a tile for the pairs of one token, and for few pairs.
        least_pairs: pairs that a tile takes at least, as matrix instructions do.
        stages: of few pairs, blocks on their way or being multiplied.
        takes_int2: the compiler makes products of many pairs with an int2 or int3 base for it. Triton before 3.9 makes
            a trap of them on Blackwell's data center cards, without a word.
    """

    single_rows: int = 64
    few_rows: int = 64
    least_pairs: int = 8
    stages: int = STAGES
    takes_int2: bool = True


def multiprocessor(capability: tuple[int, int]) -> Multiprocessor:
    """That of a compute capability, with the compiler that is here."""
    compiler = tuple(map(int, triton.__version__.split(".")[:2]))
    few_rows = 128 if capability in ROOMY else 64
    return Multiprocessor(few_rows=few_rows, takes_int2=capability[0] != 10 or compiler >= (3, 9))


def multiprocessor_of_amd(architecture: str) -> Multiprocessor:
    """That of AMD's `gfx942` and others; their matrix instructions take 16 pairs."""
    if architecture.startswith(NARROW_AMD):
        return Multiprocessor(single_rows=32, few_rows=32, least_pairs=16, stages=2)
    return Multiprocessor(least_pairs=16)


@cache
def multiprocessor_of(device: torch.device) -> Multiprocessor:
    """That of `device`; any, where it is no GPU."""
    if device.type != "cuda":
        return Multiprocessor()
    if torch.version.hip is not None:
        return multiprocessor_of_amd(torch.cuda.get_device_properties(device).gcnArchName)
    return multiprocessor(torch.cuda.get_device_capability(device))


def plan_for(num_pairs: int, num_experts: int, up: Matrix, down: Matrix, swiglu: bool, on: Multiprocessor) -> Plan:
    """Tiles for so many pairs; with `swiglu`, the first product ends in silu(gate) * up."""
    if num_pairs <= SINGLE_PAIRS:
        pairs = on.least_pairs if num_pairs <= on.least_pairs * num_experts else 16
        return few_pairs(up, down, swiglu, pairs, on.single_rows, on.stages)
    if num_pairs <= FEW_PAIRS * num_experts or (up.base < 4 and not on.takes_int2):
        return few_pairs(up, down, swiglu, 16, on.few_rows, on.stages)
    return many_pairs(up, down, swiglu)


def plan_for_linear(num_rows: int, matrix: Matrix, on: Multiprocessor) -> tuple[int, tuple[Launch, ...]]:
    """Rows of a block and the launches of one matrix, which every row meets."""
    plan = plan_for(num_rows, 1, matrix, matrix, False, on)
    return plan.block_m, plan.up


@lru_cache(maxsize=256)
def few_pairs(up: Matrix, down: Matrix, swiglu: bool, block_m: int, block_n: int, stages: int = STAGES) -> Plan:
    """Products are scaled, group by group; all tiers in one launch, told apart by a branch that a tile takes whole."""
    next_sum_width = min(down.group, block_n // 2) if swiglu and down.base != 16 else 0
    sum_widths = [0 if matrix.base == 16 else matrix.group for matrix in (up, down)]
    first = Tiling(block_m, block_n, COLUMNS, "all", swiglu, stages, False, sum_widths[0], next_sum_width)
    second = Tiling(block_m, block_n, COLUMNS, "all", False, stages, False, next_sum_width or sum_widths[1], 0)
    return Plan(block_m, (Launch(first, 4),), (Launch(second, 4),))


@lru_cache(maxsize=256)
def many_pairs(up: Matrix, down: Matrix, swiglu: bool) -> Plan:
    """Weights are scaled, so that products add up; a launch a tier, whose registers need not hold the other's."""
    block_m, block_n = 64, 128
    tiers = ("base", "upgraded") if up.upgrade else ("all",)
    first, second = (
        tuple(Launch(Tiling(block_m, block_n, COLUMNS, tier, last, STAGES_OF_MANY, True, 0, 0), 8) for tier in tiers)
        for last in (swiglu, False)
    )
    return Plan(block_m, first, second)
