"""The kernels of layers compiled ahead of their first forward, each by a launch that has nothing to compute.

Which there are follows from sizes alone (`tuning`): those for a token, for a batch of them, for a prompt. It knows
neither how many threads compile nor what a user sees of it.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from dynaexq.kernels.expert_layer import ExpertLayer
from dynaexq.kernels.linear_layer import LinearLayer
from dynaexq.kernels.triton import routing, tuning
from dynaexq.kernels.triton.launch import Experts, is_swiglu, matrices_of, sums_wanted
from dynaexq.kernels.triton.linear import matrix_of
from dynaexq.kernels.triton.preparation import prepare
from dynaexq.kernels.triton.reductions import group_sums, weighted_sum
from dynaexq.kernels.triton.specs import Matrix

Compilation = tuple[Hashable, Callable[[], None]]
"""What tells a kernel from others, and what compiles it."""


def compilations(
    experts: Iterable[ExpertLayer], linears: Iterable[LinearLayer], choices: int
) -> list[Callable[[], None]]:
    """Calls that compile all kernels of these layers, in any order and on any thread; layers alike share them.

    Args:
        choices: experts of a token.
    """
    found: dict[Hashable, Callable[[], None]] = {}
    for layer in experts:
        found.update(_of_experts(layer, choices))
    for linear in linears:
        found.update(_of_linear(linear))
    return list(found.values())


def _of_experts(layer: ExpertLayer, choices: int) -> Iterator[Compilation]:
    up, down = matrices_of(layer)
    fused, device = is_swiglu(layer) and up.bias < 0, layer.base.device
    on = tuning.multiprocessor_of(device)
    for tokens in _token_counts(layer.num_experts, choices):
        plan = tuning.plan_for(tokens * choices, layer.num_experts, up, down, fused, on)
        for matrix, launches, of_a_row in ((up, plan.up, choices), (down, plan.down, 1)):
            for launch in launches:
                product = partial(_multiply, layer.base, layer.codec.dtype, matrix, launch, of_a_row)
                yield (device, matrix, launch, of_a_row), product
        for dtype in (layer.codec.dtype, torch.float32):  # routers of some families give their weights in 32 bits
            key = device, layer.num_experts, up, down, plan, choices, dtype, tokens * choices > routing.COUNTED_PAIRS
            yield key, partial(_around, layer, up, down, plan, tokens, choices, dtype)


def _of_linear(layer: LinearLayer) -> Iterator[Compilation]:
    matrix, device = matrix_of(layer), layer.block.device
    for rows in _token_counts(1, 1):
        _, launches = tuning.plan_for_linear(rows, matrix, tuning.multiprocessor_of(device))
        for launch in launches:
            product = partial(_multiply, layer.block[None], layer.codec.dtype, matrix, launch, 1)
            yield (device, matrix, launch, 1), product
        width = launches[0].tiling.sum_width
        if width:
            row = torch.zeros(1, matrix.columns, dtype=layer.codec.dtype, device=device)
            yield (device, matrix.columns, matrix.padded, width), partial(_sum, row, matrix.padded, width)


def _token_counts(num_experts: int, choices: int) -> list[int]:
    """Numbers of tokens that between them take every kernel there is."""
    limits = 8 * num_experts, tuning.SINGLE_PAIRS, tuning.FEW_PAIRS * num_experts, routing.COUNTED_PAIRS
    return sorted({1, *(limit // choices + 1 for limit in limits)})


def _multiply(base: Tensor, dtype: torch.dtype, matrix: Matrix, launch: tuning.Launch, choices: int) -> None:
    """The product of no pair: its only block is empty."""
    zeros = partial(torch.zeros, device=base.device)
    with torch.cuda.device_of(base):
        nothing = routing.Routing(zeros(1, dtype=torch.int32), zeros(3, 1, dtype=torch.int32) - 1)
        experts = Experts(nothing, base, zeros(len(base), dtype=torch.int64))
        width = launch.tiling.sum_width
        sums = zeros(1, matrix.padded // width, dtype=torch.float32) if width else None
        experts.product(matrix, zeros(1, matrix.columns, dtype=dtype), sums, (launch,), choices)


def _around(
    layer: ExpertLayer,
    up: Matrix,
    down: Matrix,
    plan: tuning.Plan,
    tokens: int,
    choices: int,
    dtype: torch.dtype,
) -> None:
    """What stands before, between and behind the products of so many tokens, all of whose experts are elsewhere."""
    zeros = partial(torch.zeros, device=layer.base.device)
    with torch.cuda.device_of(layer.base):
        rows = zeros(tokens, layer.hidden_size, dtype=layer.codec.dtype)
        ids, weights = zeros(tokens, choices, dtype=torch.int64) - 1, zeros(tokens, choices, dtype=dtype)
        counts = zeros(layer.num_experts + 2, dtype=torch.int64)
        prepare(ids, weights, layer.num_experts, plan.block_m, sums_wanted(rows, up, plan.up), counts)
        wanted = sums_wanted(zeros(1, down.columns, dtype=layer.codec.dtype), down, plan.down)
        if wanted is not None and not plan.up[0].tiling.next_sum_width:
            group_sums(*wanted)
        result = zeros(1, layer.hidden_size, dtype=layer.codec.dtype)  # none is read
        weighted_sum(result, ids, weights, layer.num_experts)


def _sum(row: Tensor, padded: int, width: int) -> None:
    with torch.cuda.device_of(row):
        group_sums(row, padded, width)
