"""From weights to integer codes: one 8-bit grid, read to the depth that is resident. It knows no layout.

A group of G weights along K shares a float16 `scale` and `minimum`. A weight's code q is an integer in [0, 255]; its
top b bits q_b, read at the centre of their bin, stand for

    w_b = minimum + scale / 16 * (2**(8 - b) * q_b + (2**(8 - b) - 1) / 2)        b = 2, 4 or 8

so one code serves every depth and refining it only adds bits. `scale` is the step of the 4-bit reading, not of the
8-bit one: that keeps it clear of float16's subnormals. Rounding to the nearest 8-bit level and dropping bits equals
rounding to the nearest b-bit level, whichever b the grid was fitted for.

Two fits. *Round to nearest* spans the group's range. *Alternating least squares* starts there and repeats: best
scale and minimum for the codes, best codes for them; a group that float16 rounding made worse keeps the start. Least
squares returns the projection of the weights, which is shorter than they are; through gate, up and down the loss of
length multiplies. A code that is never refined is therefore *un-shrunk*: its spread round the group's centre is
stretched by (|w|^2 / <w, w_hat>)**0.7, centred.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaexq.errors import QuantizationError

ALS_ROUNDS = 10
UNSHRINK_POWER = 0.7
LARGEST_WEIGHT = 32768.0  # half of float16's range, so that minimum and scale stay finite


@dataclass(frozen=True)
class Code:
    """Coded matrices: `values` uint8 `[..., N, K]` of the 8-bit grid, `scale`, `minimum` float16 `[..., N, K/G]`."""

    values: Tensor
    scale: Tensor
    minimum: Tensor


def quantize(weights: Tensor, group_size: int, fit_bits: int = 4, method: str = "als", unshrink: bool = False) -> Code:
    """Fit codes to finite `weights` `[..., N, K]`, K a multiple of `group_size`.

    Args:
        fit_bits: the depth whose reading is made optimal: 2, 4 or 8.
        method: `"als"` or `"rtn"`.
        unshrink: stretch the reading at `fit_bits`; only for codes that are never refined, as the other readings
            no longer fit afterwards. Without effect for `"rtn"`, which does not shrink.
    """
    *lead, columns = weights.shape
    groups = weights.float().reshape(*lead, columns // group_size, group_size)
    scale, minimum = start = _range_fit(groups, fit_bits)
    if method == "als":
        for _ in range(ALS_ROUNDS):
            scale, minimum = _least_squares_fit(groups, _levels(groups, scale, minimum, fit_bits), fit_bits)
        better = _error(groups, scale, minimum, fit_bits) < _error(groups, *start, fit_bits)
        scale, minimum = _choose(better, (scale, minimum), start)
    values = _round(groups, scale, minimum)
    if unshrink and method == "als":
        scale, minimum = _unshrunk(groups, values, scale, minimum, fit_bits)
    return Code(values.view(*lead, columns), scale.squeeze(-1).half(), minimum.squeeze(-1).half())


def read(values: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The weights `[..., K]` that codes stand for at depth `bits`, in float32; bits below that depth must be zero."""
    *lead, num_groups = scale.shape
    scale, minimum = scale.float()[..., None], minimum.float()[..., None]
    groups = values.view(*lead, num_groups, -1).float()
    return (groups * (scale / 16) + (minimum + scale * _centre(bits))).view(*lead, -1)


def check_representable(weights: Tensor, name: str, first: int = 0) -> None:
    """Raise a QuantizationError naming `name` and the first expert of `weights [n, ...]` that no code represents.

    Args:
        first: number of the expert in `weights[0]`.
    """
    largest = weights.detach().abs().flatten(1).amax(1).float()  # NaN and infinity survive amax
    bad = (~(largest <= LARGEST_WEIGHT)).nonzero()
    if len(bad):
        expert = int(bad[0])
        found = float(largest[expert])
        raise QuantizationError(
            f"{name}, expert {first + expert}: expected finite weights of at most {LARGEST_WEIGHT:g}, found "
            f"{found:g}; repair the checkpoint, or keep this model in its own dtype with tiers=('fp16',)"
        )


def _centre(bits: int) -> float:
    """Half a bin at depth `bits`, in units of `scale`."""
    return (2.0 ** (8 - bits) - 1) / 32


def _stored(step: Tensor, offset: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`offset + step * q_b` as (scale, minimum), rounded to float16 as they will be stored."""
    scale = (step / 2.0 ** (4 - bits)).half().float()
    return scale, (offset - scale * _centre(bits)).half().float()


def _affine(scale: Tensor, minimum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What is stored as the (step, offset) of depth `bits`; undoes `_stored`."""
    return scale * 2.0 ** (4 - bits), minimum + scale * _centre(bits)


def _round(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    step = torch.where(scale > 0, scale / 16, 1.0)
    return ((groups - minimum) / step).round_().clamp_(0, 255).to(torch.uint8)


def _levels(groups: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    return (_round(groups, scale, minimum) >> (8 - bits)).float()


def _error(groups: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """Squared error of each group read at depth `bits`."""
    step, offset = _affine(scale, minimum, bits)
    return (offset + step * _levels(groups, scale, minimum, bits) - groups).square().sum(-1, keepdim=True)


def _choose(condition: Tensor, fit: tuple[Tensor, Tensor], otherwise: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per group, one (scale, minimum) or the other."""
    return torch.where(condition, fit[0], otherwise[0]), torch.where(condition, fit[1], otherwise[1])


def _range_fit(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return _stored((high - low) / (2**bits - 1), low, bits)


def _least_squares_fit(groups: Tensor, levels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    mean, mean_level = groups.mean(-1, keepdim=True), levels.mean(-1, keepdim=True)
    spread = levels - mean_level
    step = (spread * groups).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp_min(1e-6)
    step = step.clamp_min(0)
    return _stored(step, mean - step * mean_level, bits)


def _unshrunk(groups: Tensor, values: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = (values >> (8 - bits)).float()
    step, offset = _affine(scale, minimum, bits)
    reading = offset + step * levels
    centre = reading.mean(-1, keepdim=True)
    weights = groups - groups.mean(-1, keepdim=True)
    along = (weights * (reading - centre)).sum(-1, keepdim=True)
    stretch = torch.where(along > 0, weights.square().sum(-1, keepdim=True) / along, 1.0).clamp(1.0, 4.0)
    stretch = stretch**UNSHRINK_POWER
    stretched = _stored(step * stretch, centre + stretch * (offset - centre), bits)
    return _choose(stretched[1].isfinite(), stretched, (scale, minimum))  # a giant may leave float16's range
