"""Which pairs share an expert: lists of blocks, made on the device and never seen by the host.

A *pair* is one choice of one token, number token * k + choice. Pairs are ordered by expert and cut into *blocks* of at
most M that share one. The host cannot know how many blocks there are, so the list has as many slots as there could
be, and some stay empty.

Shapes: T tokens, k choices, P = T k pairs, M pairs of a block, S slots, G pairs of a program, O that they are compared
with.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaexq.types import LARGEST_MASS, MASS_UNIT

COUNTED_PAIRS = 2048  # up to here every pair is compared with every other in one launch; beyond, torch sorts

PAIRS_PER_PROGRAM, OTHERS_AT_A_TIME = 32, 128
"""Pairs that a program places, and those that it compares them with in one step, of which each waits for its loads."""

COUNTED_PER_PROGRAM = 256


class Routing(NamedTuple):
    """Blocks of pairs.

    Three tokens, two choices each, experts (0, 2), (2, 1), (0, 2), blocks of at most two: pairs 0 and 4 go to expert
    0, pair 3 to expert 1, pairs 1, 2 and 5 to expert 2, so `order` is [0, 4, 3, 1, 2, 5] and the first four slots of
    `blocks` are experts [0, 1, 2, 2], beginning at [0, 2, 3, 5], with [2, 1, 2, 1] pairs.

    Attributes:
        order: int32 `[P]`, pairs by expert, by number within one; those of foreign ids last.
        blocks: int32 `[3, S]`: the expert, or -1 for an empty slot; where in `order` the block begins; its pairs.
    """

    order: Tensor
    blocks: Tensor


def route_torch(top_k_index: Tensor, num_experts: int, block_m: int) -> Routing:
    """The blocks of `top_k_index [T, k]` by sorting, in PyTorch; ids outside `[0, num_experts)` are in none.

    The twin that `count_pairs` is held to, and faster for many pairs.
    """
    ids = top_k_index.reshape(-1)
    experts = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(torch.int64)  # [P]
    order = torch.argsort(experts, stable=True)  # [P]
    ones = torch.ones_like(experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, experts, ones)
    counts = counts[:num_experts]  # [E], pairs of each expert
    per_expert = (counts + block_m - 1) // block_m  # [E], its blocks
    last_block = per_expert.cumsum(0)  # [E]
    slot = torch.arange(min(len(ids), len(ids) // block_m + num_experts), device=ids.device)  # [S]
    expert = torch.searchsorted(last_block, slot, right=True)  # [S], num_experts for an empty slot
    known = expert.clamp(max=num_experts - 1)
    done = (slot - last_block[known] + per_expert[known]) * block_m  # [S], pairs of this expert in the blocks before
    blocks = torch.stack(
        [
            torch.where(expert < num_experts, expert, -1),
            counts.cumsum(0)[known] - counts[known] + done,
            (counts[known] - done).clamp(max=block_m),
        ]
    )  # [3, S]
    return Routing(order.to(torch.int32), blocks.to(torch.int32))


def empty_routing(top_k_index: Tensor, num_experts: int, block_m: int) -> Routing:
    """Room for the blocks of `top_k_index [T, k]`, for `count_pairs` to fill."""
    pairs, device = top_k_index.numel(), top_k_index.device
    dense = pairs // block_m + num_experts
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    if pairs <= dense:  # each pair has a slot, which it fills if it is the first of a block
        return Routing(order, torch.empty(3, pairs, dtype=torch.int32, device=device))
    return Routing(order, torch.full((3, dense), -1, dtype=torch.int32, device=device))


@triton.jit
def count_pairs(ids, order, blocks, pairs, slots, num_experts, block_m, PROGRAM: tl.constexpr, OTHERS: tl.constexpr):
    """Each pair of a program finds its place by counting the pairs that come before it."""
    pair = tl.program_id(0) * PROGRAM + tl.arange(0, PROGRAM)  # [G]
    expert = _load_expert(ids, pair, pairs, num_experts)  # [G]
    place = tl.zeros((PROGRAM,), tl.int32)  # [G], its place in the order
    rank = tl.zeros((PROGRAM,), tl.int32)  # [G], pairs of its expert before it
    shared = tl.zeros((PROGRAM,), tl.int32)  # [G], pairs of its expert
    for start in tl.range(0, pairs, OTHERS):
        other = start + tl.arange(0, OTHERS)  # [O]
        others = _load_expert(ids, other, pairs, num_experts)  # [O]
        same = (others[None, :] == expert[:, None]) & (other < pairs)[None, :]  # [G, O]
        earlier = same & (other[None, :] < pair[:, None])
        place += tl.sum((earlier | (others[None, :] < expert[:, None])).to(tl.int32), axis=1)
        rank += tl.sum(earlier.to(tl.int32), axis=1)
        shared += tl.sum(same.to(tl.int32), axis=1)
    tl.store(order + place, pair, mask=pair < pairs)

    opens = (expert < num_experts) & (rank % block_m == 0)
    slot = pair
    fills = pair < pairs
    if slots < pairs:
        # Blocks of one expert begin M apart, and the next expert's number is higher: no two come to the same slot.
        slot = place // block_m + expert
        fills = fills & opens
    tl.store(blocks + slot, tl.where(opens, expert, -1), mask=fills)
    tl.store(blocks + slots + slot, place, mask=fills)
    tl.store(blocks + 2 * slots + slot, tl.minimum(shared - rank, block_m), mask=fills)


@triton.jit
def _load_expert(ids, pair, pairs, num_experts):
    """Experts of `pair`, int32; `num_experts` for foreign ids and for pairs that are none."""
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


def add_routing(sums: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """The same integers as `memory.RoutingCounter` adds; their order of addition is free, for integers do not mind."""
    tokens, choices = top_k_index.shape
    ids, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    programs = max(1, triton.cdiv(tokens * choices, COUNTED_PER_PROGRAM))
    with torch.cuda.device_of(sums):
        add_mass[(programs,)](
            sums,
            ids,
            weights,
            tokens * choices,
            tokens,
            len(sums) - 2,
            0,
            MASS_UNIT,
            LARGEST_MASS,
            COUNTED_PER_PROGRAM,
        )


@triton.jit(do_not_specialize=["pairs", "tokens"])
def add_mass(
    sums,
    ids,
    weights,
    pairs,
    tokens,
    num_experts,
    first,
    UNITS: tl.constexpr,
    LARGEST: tl.constexpr,
    PROGRAM: tl.constexpr,
):
    """Add the routing mass of the pairs of each program from `first` on, and the tokens once."""
    program = tl.program_id(0) - first
    pair = program * PROGRAM + tl.arange(0, PROGRAM)
    mask = pair < pairs
    expert = tl.load(ids + pair, mask=mask, other=-1)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    weight = tl.load(weights + pair, mask=mask, other=0.0).to(tl.float32)
    weight = tl.where(tl.abs(weight) < float("inf"), weight, 0.0)
    mass = tl.minimum(tl.maximum(weight, 0.0), LARGEST).to(tl.float64) * UNITS
    rounded = tl.floor(mass + 0.5)
    units = rounded.to(tl.int64)
    units -= ((rounded - mass == 0.5) & (units % 2 == 1)).to(tl.int64)  # halves go to the even neighbor
    tl.atomic_add(sums + expert, units, mask=mask)
    if program == 0:
        tl.atomic_add(sums + num_experts + 1, tokens.to(tl.int64))
