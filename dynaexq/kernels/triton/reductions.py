"""What happens to rows of activations around the products: sums over groups of columns, and sums over choices.

Shapes: T tokens, k choices, H columns of a row, G columns of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS_PER_PROGRAM = 16
COLUMNS_PER_PROGRAM = 1024


def group_sums(rows: Tensor, padded: int, group_size: int) -> Tensor:
    """Sums float32 `[n, padded / G]` of `rows [n, H]` over groups of G columns; padding counts as zero."""
    num_groups = padded // group_size
    sums = torch.empty(len(rows), num_groups, dtype=torch.float32, device=rows.device)
    grid = (len(rows), triton.cdiv(num_groups, GROUPS_PER_PROGRAM))
    _group_sums[grid](rows, sums, rows.shape[1], num_groups, group_size, GROUPS_PER_PROGRAM)
    return sums


@triton.jit
def _group_sums(rows, sums, columns, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    sum_groups(rows, sums, columns, num_groups, tl.program_id(0), tl.program_id(1), GROUP, GROUPS)


@triton.jit
def sum_groups(rows, sums, columns, num_groups, row, part, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Store the sums of `GROUPS` groups of one row, the `part`-th of them."""
    row = row.to(tl.int64)
    group = part * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [groups, G]
    values = tl.load(rows + row * columns + column, mask=column < columns, other=0.0)
    tl.store(sums + row * num_groups + group, tl.sum(values.to(tl.float32), axis=1), mask=group < num_groups)


def weighted_sum(results: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Tensor:
    """Output `[T, H]`: `results [T k, H]` times their routing weights, summed over the choices of each token in turn.

    Results of ids outside `[0, num_experts)` are not read.
    """
    tokens, choices = top_k_index.shape
    hidden = results.shape[1]
    output = torch.empty(tokens, hidden, dtype=results.dtype, device=results.device)
    grid = (tokens, triton.cdiv(hidden, COLUMNS_PER_PROGRAM))
    _weighted_sum[grid](results, top_k_index, top_k_weights, output, hidden, num_experts, choices, COLUMNS_PER_PROGRAM)
    return output


@triton.jit
def _weighted_sum(results, ids, weights, output, hidden, num_experts, CHOICES: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.zeros((COLUMNS,), tl.float32)  # [columns]
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.where(inside, tl.load(ids + pair), -1)  # [columns]
        ours = (expert >= 0) & (expert < num_experts)  # a branch would have each choice wait for the one before
        result = tl.load(results + pair * hidden + column, mask=ours, other=0.0)
        weight = tl.load(weights + pair).to(tl.float32)
        total += tl.where(ours, result.to(tl.float32) * weight, 0.0)
    tl.store(output + token * hidden + column, total.to(output.dtype.element_ty), mask=inside)
