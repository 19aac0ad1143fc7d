"""Codes chosen one column after the other, what each errs by fed back to those after it (Frantar et al., GPTQ, 2022).

With the second moments H of the inputs, the error of the output is trace(D H D') for an error D of the weights. Once
column k is coded, the columns after it change by the error times row k of U / U[k, k], where U is the upper Cholesky
factor of the inverse of H: the change that takes most off the output's error.

A code with two readings has two errors, so two copies of the weights are carried along, and the code that is best for
both is taken: the coarse reading chooses the bin, the fine one its place in it.
"""

import torch
from torch import Tensor

from dynaexq.quantization.scales import Grid, Targets, fitted_grid, levels, nearest, unshrunk

COARSE_WEIGHT = 0.3
"""What the squared error of the coarse reading weighs where a code is chosen; more would cost the fine one."""


def fed_back(
    weights: Tensor, group_size: int, targets: Targets, unshrink: bool, importance: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[n, N, K]`, scales and minimums float16 `[n, N, K/G]` of matrices `[n, N, K]`, float32.

    Args:
        targets: one precision, or two with the finer one first.
        unshrink: as for `quantize`.
        importance: `[n, K]`, the diagonal of H.
        factor: U, `[n, K, K]`.
    """
    carried = [weights.clone() for _ in targets]
    values = torch.zeros_like(weights, dtype=torch.uint8)
    grids = []
    for first in range(0, weights.shape[2], group_size):
        last = first + group_size
        group, counts = carried[0][..., first:last].contiguous(), importance[:, None, first:last]
        grid = fitted_grid(group, targets, counts)
        if unshrink:
            grid = unshrunk(group, nearest(group, grid), grid, targets[0].bits, counts)
        groups = [part[..., first:last].contiguous() for part in carried]
        values[..., first:last], errors = _code_group(groups, grid, targets, factor[:, first:last, first:last])
        for part, error in zip(carried, errors, strict=True):
            for i, own in enumerate(factor):  # one by one, so that the bits do not depend on how many there are
                part[i, :, last:] -= error[i] @ own[first:last, last:]
        grids.append(grid)
    scale, minimum = (torch.cat(parts, 2).half() for parts in zip(*grids, strict=True))
    return values, scale, minimum


def _code_group(groups: list[Tensor], grid: Grid, targets: Targets, factor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The codes of one group, and for each target the errors in units of U[k, k]; changes `groups` as it goes."""
    errors = [torch.empty_like(part) for part in groups]
    values = torch.empty_like(groups[0], dtype=torch.uint8)
    for k in range(factor.shape[-1]):
        columns = [part[..., k : k + 1] for part in groups]
        code = _code(columns, grid, targets)
        values[..., k : k + 1] = code
        row = factor[:, None, k, k:]
        for part, column, error, target in zip(groups, columns, errors, targets, strict=True):
            reading = grid[1] + grid[0] * levels(code, target.bits)
            error[..., k : k + 1] = (column - reading) / row[..., :1]
            part[..., k + 1 :] -= error[..., k : k + 1] * row[..., 1:]
    return values, errors


def _code(columns: list[Tensor], grid: Grid, targets: Targets) -> Tensor:
    """The codes of one column: nearest to the finer target, or nearest to it in the bin that the coarser one wants."""
    fine = nearest(columns[0], grid)
    if len(targets) == 1:
        return fine
    lowest = nearest(columns[1], grid) & (0xFF << (8 - targets[1].bits) & 0xFF)
    inside = fine.clamp(lowest, lowest + (0xFF >> targets[1].bits))
    better = _cost(inside, columns, grid, targets) < _cost(fine, columns, grid, targets)
    return torch.where(better, inside, fine)


def _cost(code: Tensor, columns: list[Tensor], grid: Grid, targets: Targets) -> Tensor:
    scale, minimum = grid
    fine, coarse = (
        (minimum + scale * levels(code, target.bits) - column).square()
        for target, column in zip(targets, columns, strict=True)
    )
    return fine + COARSE_WEIGHT * coarse
