"""Fit the scale and minimum of each group of weights by alternating least squares.

A group of G weights and its code are `[..., G]`; scale and minimum are `[..., 1]`, rounded as they will be stored
(`grid_format`). A *target* is a number of bits at which the code will be read. Several targets share one code: their
levels are stacked, and one least-squares problem serves them all. `importance` weighs the error of each weight; it is
the mean square of the input that the weight meets, so that the weighted error is that of the output.

Least squares returns the projection of the weights, which is shorter than they are, by 1 - error**2; through gate, up
and down the loss of length multiplies. So the coarser of two targets is fitted to weights that are longer (`length`),
and a code with one target is stretched afterwards (`unshrunk`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dynaexq.quantization.grid_format import Grid, GridFormat

ROUNDS = 10
STARTS = (1.0, 0.8, 0.6)
"""Shares of its range that a 2-bit code starts from: with four levels the nearest optimum is often not the best."""

ROUNDS_TO_CHOOSE = 2
ROUNDS_TOGETHER = 5
UNSHRINK_POWER = 0.7


class Target(NamedTuple):
    """A number of bits at which a code will be read.

    `Target(2, weight=0.5, length=1.1)`: 2-bit weights, which count half and should be a tenth longer than exact ones.

    Attributes:
        weight: of its squared error.
        length: wanted norm, in norms of the exact weights.
    """

    bits: int
    weight: float = 1.0
    length: float = 1.0


Targets = tuple[Target, ...]


def center(bits: int) -> float:
    """Half a bin at `bits` bits, in units of scale."""
    return (2.0 ** (8 - bits) - 1) / 32


def levels(values: Tensor, bits: int) -> Tensor:
    """Where codes read at `bits` bits lie, in units of scale above the minimum."""
    return (values >> (8 - bits)).float().mul_(2.0 ** (4 - bits)).add_(center(bits))


def nearest(groups: Tensor, grid: Grid) -> Tensor:
    """The nearest 8-bit codes, uint8; their top bits are the nearest at any number of bits."""
    scale, minimum = grid
    step = torch.where(scale > 0, scale / 16, 1.0)
    return ((groups - minimum) / step).round_().clamp_(0, 255).to(torch.uint8)


def range_grid(groups: Tensor, bits: int, form: GridFormat, share: float = 1.0) -> Grid:
    """The grid that spans at `bits` bits a `share` of the range of each group, round its middle."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if form.reaches_zero:
        low, high = low.clamp_max(0), high.clamp_min(0)
    step = (high - low) * (share / (2**bits - 1))
    return form.rounded(step * (2.0 ** (bits - 4) * form.slack), low + (high - low) * ((1 - share) / 2), center(bits))


def fitted_grid(groups: Tensor, targets: Targets, form: GridFormat, importance: Tensor | None = None) -> Grid:
    """Alternating least squares: the best grid for the codes, the nearest codes of the grid, and again.

    A group that ends worse than its range grid, as rounding can make it, keeps that one.

    Args:
        targets: the finest first.
        importance: `[..., G]`, to broadcast with `groups`; None where all weights count alike.
    """
    first = targets[0]
    start = range_grid(groups, first.bits, form)
    if first.bits == 2:
        starts = (range_grid(groups, 2, form, share) for share in STARTS)
        tried = [_alternate(groups, grid, targets, form, ROUNDS_TO_CHOOSE) for grid in starts]
        grid = _alternate(groups, _best(groups, tried, targets, None), targets, form, ROUNDS_TOGETHER)
    else:
        grid = _alternate(groups, start, (first,), form, ROUNDS if len(targets) == 1 else ROUNDS_TOGETHER)
        if len(targets) > 1:
            grid = _alternate(groups, grid, targets, form, ROUNDS_TOGETHER)
    if importance is not None:
        weighed = _alternate(groups, grid, targets, form, ROUNDS, importance)
        grid = _best(groups, [grid, weighed], targets, importance)
    return _best(groups, [start, grid], targets, importance)


def unshrunk(
    groups: Tensor, values: Tensor, grid: Grid, bits: int, form: GridFormat, importance: Tensor | None = None
) -> Grid:
    """The grid stretched round the center of its reading by (|w|^2 / <w, w_hat>)**0.7, centred, at `bits` bits."""
    scale, minimum = grid
    level = levels(values, bits)
    middle = _mean(level, importance)
    weights = groups - _mean(groups, importance)
    along = _mean(weights * (level - middle) * scale, importance)
    stretch = torch.where(along > 0, _mean(weights.square(), importance) / along, 1.0).clamp(1.0, 4.0)
    stretch = stretch**UNSHRINK_POWER
    stretched = form.rounded(scale * stretch, minimum + scale * middle, middle)
    return _choose(stretched[1].isfinite(), stretched, grid)  # a giant may leave float16's range


def _alternate(
    groups: Tensor, grid: Grid, targets: Targets, form: GridFormat, rounds: int, importance: Tensor | None = None
) -> Grid:
    """The grid after so many rounds, rounded once, at the end: steps that are smaller than rounding are steps too."""
    mean = _mean(groups, importance)
    away = groups - mean
    for _ in range(rounds):
        scale, middle = _least_squares(away, nearest(groups, grid), targets, importance)
        grid = scale, mean - scale * middle
    return form.rounded(scale, mean, middle)


def _least_squares(away: Tensor, values: Tensor, targets: Targets, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scale with the least squared error, summed over `targets`, for given codes of weights that are `away` from
    their mean, and the level that stands for the mean."""
    stacked = [levels(values, target.bits) for target in targets]
    total = sum(target.weight for target in targets)
    middle = along = spread = away.new_zeros(*away.shape[:-1], 1)
    for target, level in zip(targets, stacked, strict=True):
        middle = middle + target.weight / total * _mean(level, importance)
    for target, level in zip(targets, stacked, strict=True):
        level -= middle
        along = along + target.weight * target.length * _mean(level * away, importance)
        spread = spread + target.weight * _mean(level.square(), importance)
    return (along / spread.clamp_min(1e-9)).clamp_min(0), middle


def _errors(groups: Tensor, grid: Grid, targets: Targets, importance: Tensor | None) -> Tensor:
    """Squared error of each group, summed over `targets`."""
    scale, minimum = grid
    values = nearest(groups, grid)
    mean = _mean(groups, importance)
    total = torch.zeros_like(mean)
    for target in targets:
        wanted = groups if target.length == 1 else mean + target.length * (groups - mean)
        reading = minimum + scale * levels(values, target.bits)
        total = total + target.weight * _mean((reading - wanted).square(), importance)
    return total


def _best(groups: Tensor, grids: list[Grid], targets: Targets, importance: Tensor | None) -> Grid:
    """Of several grids the best for each group; the earlier where two are as good."""
    best, least = grids[0], _errors(groups, grids[0], targets, importance)
    for grid in grids[1:]:
        errors = _errors(groups, grid, targets, importance)
        best, least = _choose(errors < least, grid, best), torch.minimum(errors, least)
    return best


def _mean(parts: Tensor, importance: Tensor | None) -> Tensor:
    if importance is None:
        return parts.mean(-1, keepdim=True)
    return (parts * importance).sum(-1, keepdim=True) / importance.sum(-1, keepdim=True)


def _choose(condition: Tensor, grid: Grid, otherwise: Grid) -> Grid:
    return torch.where(condition, grid[0], otherwise[0]), torch.where(condition, grid[1], otherwise[1])
