"""Routing mass into a layer's counters, in one launch where torch needs a dozen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaexq.types import LARGEST_MASS, MASS_UNIT

PAIRS_PER_PROGRAM = 256


def add_routing(sums: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """The same integers as `memory.RoutingCounter` adds; their order of addition is free, for integers do not mind."""
    tokens, choices = top_k_index.shape
    ids, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    programs = max(1, triton.cdiv(tokens * choices, PAIRS_PER_PROGRAM))
    with torch.cuda.device_of(sums):
        _add_routing[(programs,)](
            sums, ids, weights, tokens * choices, tokens, len(sums) - 2, MASS_UNIT, LARGEST_MASS, PAIRS_PER_PROGRAM
        )


@triton.jit(do_not_specialize=["pairs", "tokens"])
def _add_routing(
    sums,
    ids,
    weights,
    pairs,
    tokens,
    num_experts,
    UNITS: tl.constexpr,
    LARGEST: tl.constexpr,
    PROGRAM: tl.constexpr,
):
    pair = tl.program_id(0) * PROGRAM + tl.arange(0, PROGRAM)
    mask = pair < pairs
    expert = tl.load(ids + pair, mask=mask, other=-1)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    weight = tl.load(weights + pair, mask=mask, other=0.0).to(tl.float32)
    weight = tl.where(tl.abs(weight) < float("inf"), weight, 0.0)
    mass = tl.minimum(tl.maximum(weight, 0.0), LARGEST).to(tl.float64) * UNITS
    rounded = tl.floor(mass + 0.5)
    units = rounded.to(tl.int64)
    units -= ((rounded - mass == 0.5) & (units % 2 == 1)).to(tl.int64)  # halves go to the even neighbour
    tl.atomic_add(sums + expert, units, mask=mask)
    if tl.program_id(0) == 0:
        tl.atomic_add(sums + num_experts + 1, tokens.to(tl.int64))
