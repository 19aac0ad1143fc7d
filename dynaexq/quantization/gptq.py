"""Codes chosen one column after the other, what each errs by fed back to those after it (Frantar et al., GPTQ, 2022).

With the second moments H of the inputs, the error of the output is trace(D H D') for an error D of the weights. Once
column k is coded, the columns after it change by the error times row k of U / U[k, k], where U is the upper Cholesky
factor of the inverse of H: the change that takes most off the output's error.

What is chosen first knows nothing of what comes after it. So the groups are gone through again, in turn: each gets the
grid that is best for its codes, and then each of its columns the code that is best, all others being what they are.
Either step can only lower the error.

A code with two readings has two errors, so two copies of the weights are carried along, and the code that is best for
both is taken: the coarse reading chooses the bin, the fine one its place in it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dynaexq.quantization.grid_format import Grid, GridFormat
from dynaexq.quantization.moments import InputsOfMatrices
from dynaexq.quantization.scales import Targets, fitted_grid, levels, nearest, unshrunk

COARSE_WEIGHT = 0.3
"""What the squared error of the coarse reading weighs where a code is chosen; more would cost the fine one."""

SWEEPS = 3
"""How often the groups are gone through again: benchmarks/quality/quantizers.py."""

MIDDLE = 8.0
"""Of all levels, in units of scale above the minimum."""


def fed_back(
    weights: Tensor,
    group_size: int,
    targets: Targets,
    unshrink: bool,
    form: GridFormat,
    inputs: InputsOfMatrices,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[n, N, K]`, scales and minimums `[n, N, K/G]` of matrices `[n, N, K]`, float32.

    Args:
        targets: one precision, or two with the finer one first.
        unshrink, form: as for `quantize`.
        inputs: of each matrix.
    """
    factor, carried = inputs.factor, [weights.clone() for _ in targets]
    values = torch.zeros_like(weights, dtype=torch.uint8)
    grids = []
    for first in range(0, weights.shape[2], group_size):
        last = first + group_size
        group, counts = carried[0][..., first:last].contiguous(), inputs.importance[:, None, first:last]
        grid = fitted_grid(group, targets, form, counts)
        if unshrink:
            grid = unshrunk(group, nearest(group, grid), grid, targets[0].bits, form, counts)
        groups = [part[..., first:last].contiguous() for part in carried]
        values[..., first:last], errors = _code_group(groups, grid, targets, factor[:, first:last, first:last])
        for part, error in zip(carried, errors, strict=True):
            for i, own in enumerate(factor):  # one by one, so that the bits do not depend on how many there are
                part[i, :, last:] -= error[i] @ own[first:last, last:]
        grids.append(grid)
    del carried
    for _ in range(SWEEPS):
        _sweep(weights, values, grids, targets, form, inputs.moments)
    scale, minimum = (torch.cat(parts, 2) for parts in zip(*grids, strict=True))
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
        readings = _readings(code, grid, targets)
        for part, column, error, reading in zip(groups, columns, errors, readings, strict=True):
            error[..., k : k + 1] = (column - reading) / row[..., :1]
            part[..., k + 1 :] -= error[..., k : k + 1] * row[..., 1:]
    return values, errors


class _Group(NamedTuple):
    """One group of columns, for each reading of its codes; all of it changes as codes do.

    Attributes:
        weights: `[n, N, G]`.
        values: uint8 `[n, N, G]`.
        errors: of the readings, `[n, N, G]` each.
        pulls: how the output's error grows with each weight, half of its gradient, `[n, N, G]` each.
        moments: of these columns, `[n, G, G]`.
    """

    weights: Tensor
    values: Tensor
    errors: list[Tensor]
    pulls: list[Tensor]
    moments: Tensor


def _sweep(
    weights: Tensor, values: Tensor, grids: list[Grid], targets: Targets, form: GridFormat, moments: Tensor
) -> None:
    """Improve codes `[n, N, K]` and the grid `[n, N, 1]` of each group, in place.

    Args:
        moments: H, `[n, K, K]`.
    """
    size = weights.shape[2] // len(grids)
    spans = [slice(first, first + size) for first in range(0, weights.shape[2], size)]
    errors = [torch.empty_like(weights) for _ in targets]
    for span, grid in zip(spans, grids, strict=True):
        for error, reading in zip(errors, _readings(values[..., span], grid, targets), strict=True):
            error[..., span] = reading - weights[..., span]
    for number, span in enumerate(spans):
        pulls = [_times(error, moments[:, :, span]) for error in errors]
        parts = [error[..., span] for error in errors]
        group = _Group(weights[..., span], values[..., span], parts, pulls, moments[:, span, span])
        grids[number] = _refitted(group, grids[number], targets, form)
        for error, pull, reading in zip(parts, pulls, _readings(group.values, grids[number], targets), strict=True):
            change = reading - group.weights - error
            error += change
            pull += _times(change, group.moments)
        _choose_again(group, grids[number], targets)


def _refitted(group: _Group, grid: Grid, targets: Targets, form: GridFormat) -> Grid:
    """The grid that is best for the codes; the old one where rounding makes the new one worse.

    How the output's error grows with scale and minimum is a quadratic form of two unknowns.
    """
    scales = both = minima = scale_pull = minimum_pull = torch.zeros_like(grid[0])
    for target, pull, weight in zip(targets, group.pulls, (1.0, COARSE_WEIGHT), strict=False):
        level = levels(group.values, target.bits)
        through = _times(level, group.moments)
        scales = scales + weight * (through * level).sum(-1, keepdim=True)
        both = both + weight * through.sum(-1, keepdim=True)
        minima = minima + weight * group.moments.sum((1, 2))[:, None, None]
        scale_pull = scale_pull + weight * (pull * level).sum(-1, keepdim=True)
        minimum_pull = minimum_pull + weight * pull.sum(-1, keepdim=True)
    independent = (scales * minima - both.square()).clamp_min(1e-6 * scales * minima + 1e-30)
    scale = (grid[0] - (minima * scale_pull - both * minimum_pull) / independent).clamp_min(0)
    minimum = grid[1] - (scales * minimum_pull - both * scale_pull) / independent
    new = form.rounded(scale, minimum + MIDDLE * scale, MIDDLE)
    by, up = new[0] - grid[0], new[1] - grid[1]
    growth = 2 * (by * scale_pull + up * minimum_pull + by * up * both) + by.square() * scales + up.square() * minima
    return torch.where(growth < 0, new[0], grid[0]), torch.where(growth < 0, new[1], grid[1])


def _choose_again(group: _Group, grid: Grid, targets: Targets) -> None:
    """Give each column in turn its best code, all others being what they are."""
    for k in range(group.moments.shape[-1]):
        column, row = slice(k, k + 1), group.moments[:, None, k]
        exact, alone = group.weights[..., column], row[..., column]
        states = list(zip(group.errors, group.pulls, strict=True))
        wanted = [exact + error[..., column] - pull[..., column] / alone for error, pull in states]
        code = group.values[..., column] = _code(wanted, grid, targets)
        for (error, pull), reading in zip(states, _readings(code, grid, targets), strict=True):
            change = reading - exact - error[..., column]
            error[..., column] += change
            pull += change * row


def _readings(values: Tensor, grid: Grid, targets: Targets) -> list[Tensor]:
    """The weights that codes stand for, at each of `targets`."""
    return [grid[1] + grid[0] * levels(values, target.bits) for target in targets]


def _times(parts: Tensor, matrices: Tensor) -> Tensor:
    """`[n, N, K]` times `[n, K, M]`, one by one, so that the bits do not depend on how many there are."""
    return torch.stack([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


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
    readings = _readings(code, grid, targets)
    fine, coarse = ((reading - column).square() for reading, column in zip(readings, columns, strict=True))
    return fine + COARSE_WEIGHT * coarse
