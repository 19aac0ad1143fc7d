"""What a layer needs before its first product, in one launch: blocks of pairs, sums of activations, routing counted.

Programs of three kinds stand behind each other in one grid. It launches no product.

Shapes: T tokens, k choices, H columns of a row, KP of them with padding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaexq.kernels.triton import routing
from dynaexq.kernels.triton.reductions import GROUPS_PER_PROGRAM, group_sums, sum_groups
from dynaexq.kernels.triton.routing import (
    COUNTED_PER_PROGRAM,
    OTHERS_AT_A_TIME,
    PAIRS_PER_PROGRAM,
    Routing,
    add_mass,
    add_routing,
    count_pairs,
    empty_routing,
    route_torch,
)
from dynaexq.types import LARGEST_MASS, MASS_UNIT


class Sums(NamedTuple):
    """Of which activations `[T, H]` sums are wanted: over `width` of `padded` columns each."""

    rows: Tensor
    padded: int
    width: int


def prepare(
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    block_m: int,
    wanted: Sums | None = None,
    counts: Tensor | None = None,
) -> tuple[Routing, Tensor | None]:
    """The blocks of `top_k_index [T, k]`, and the sums float32 `[T, KP / width]` that are wanted.

    Args:
        counts: int64 `[num_experts + 2]` to which the routing is added, as `routing.add_routing` does.
    """
    if top_k_index.numel() > routing.COUNTED_PAIRS:
        if counts is not None:
            add_routing(counts, top_k_index, top_k_weights)
        sums = None if wanted is None else group_sums(*wanted)
        return route_torch(top_k_index, num_experts, block_m), sums
    found, sums = empty_routing(top_k_index, num_experts, block_m), None
    (tokens, choices), num_groups, columns, width = top_k_index.shape, 0, 0, 1
    if wanted is not None:
        num_groups, columns, width = wanted.padded // wanted.width, wanted.rows.shape[1], wanted.width
        sums = torch.empty(tokens, num_groups, dtype=torch.float32, device=wanted.rows.device)
    pairs = tokens * choices
    counting = triton.cdiv(pairs, PAIRS_PER_PROGRAM)
    adding = 0 if counts is None else triton.cdiv(pairs, COUNTED_PER_PROGRAM)
    summing = tokens * triton.cdiv(num_groups, GROUPS_PER_PROGRAM)
    _prepare[(counting + adding + summing,)](
        *(top_k_index, top_k_weights, found.order, found.blocks, counts),
        *(None if wanted is None else wanted.rows, sums),
        *(counting, adding, pairs, tokens, found.blocks.shape[1], num_experts, block_m, columns, num_groups),
        *(
            PAIRS_PER_PROGRAM,
            OTHERS_AT_A_TIME,
            MASS_UNIT,
            LARGEST_MASS,
            COUNTED_PER_PROGRAM,
            width,
            GROUPS_PER_PROGRAM,
        ),
    )
    return found, sums


@triton.jit(do_not_specialize=["counting", "adding", "pairs", "tokens", "slots"])
def _prepare(
    ids,
    weights,
    order,
    blocks,
    counts,
    rows,
    sums,
    counting,
    adding,
    pairs,
    tokens,
    slots,
    num_experts,
    block_m,
    columns,
    num_groups,
    PAIRS: tl.constexpr,
    OTHERS: tl.constexpr,
    UNITS: tl.constexpr,
    LARGEST: tl.constexpr,
    COUNTED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Programs `0 .. counting` find blocks, the next `adding` count the routing, all others sum activations."""
    program = tl.program_id(0)
    if program < counting:
        count_pairs(ids, order, blocks, pairs, slots, num_experts, block_m, PAIRS, OTHERS)
    else:
        if counts is not None:
            if program < counting + adding:
                add_mass(counts, ids, weights, pairs, tokens, num_experts, counting, UNITS, LARGEST, COUNTED)
        if sums is not None:
            if program >= counting + adding:
                parts = (num_groups + GROUPS - 1) // GROUPS
                number = program - counting - adding
                sum_groups(rows, sums, columns, num_groups, number // parts, number % parts, WIDTH, GROUPS)
