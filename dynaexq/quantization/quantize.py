"""From weights to integer codes: one 8-bit grid, read to the bits that are resident. It knows no layout.

A group of G weights along K shares a `scale` and a `minimum` (`grid_format`). A weight's code q is an integer in
[0, 255]; its top b bits q_b, read at the center of their bin, stand for

    w_b = minimum + scale / 16 * (2**(8 - b) * q_b + (2**(8 - b) - 1) / 2)        b = 2, 3, 4, 6 or 8

so one code serves every precision and refining it only adds bits. `scale` is the step of the 4-bit reading, not of the
8-bit one: that keeps a float16 clear of its subnormals. Rounding to the nearest 8-bit level and dropping bits equals
rounding to the nearest b-bit level, whichever b the grid was fitted for.

Grids come from `scales`: *round to nearest* spans the group's range, *alternating least squares* minimizes the error.
Where something is known of the inputs (`moments`), it is the error of the output that is minimized: weights count by
the mean square of what they meet, and what one column errs by is fed back to the columns after it (`gptq`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dynaexq.errors import QuantizationError
from dynaexq.quantization.gptq import fed_back
from dynaexq.quantization.grid_format import GridFormat, HalfGrids
from dynaexq.quantization.moments import Inputs, InputsOfMatrices
from dynaexq.quantization.scales import Target, center, fitted_grid, nearest, range_grid, unshrunk

LARGEST_WEIGHT = 32768.0  # half of float16's range, so that minimum and scale stay finite
COARSE = {2: Target(2, weight=0.5, length=1.1), 3: Target(3, weight=0.5, length=1.03)}
"""How a code that is fitted for more bits looks after a coarser reading; benchmarks/quality/quantizers.py has
those of two bits, and docs/log.md what else was tried."""


@dataclass(frozen=True)
class Code:
    """Coded matrices: `values` uint8 `[..., N, K]` of the 8-bit grid, `scale`, `minimum` float32 `[..., N, K/G]`."""

    values: Tensor
    scale: Tensor
    minimum: Tensor


def quantize(
    weights: Tensor,
    group_size: int,
    fit_bits: int = 4,
    method: str = "als",
    unshrink: bool = False,
    coarse_bits: int | None = None,
    inputs: Sequence[Inputs] | None = None,
    form: GridFormat | None = None,
) -> Code:
    """Fit codes to finite `weights` `[..., N, K]`, K a multiple of `group_size`.

    Args:
        fit_bits: the bits whose reading is made optimal: 2, 3, 4, 6 or 8.
        method: `"als"` or `"rtn"`.
        unshrink: stretch the reading at `fit_bits`; only for codes that are never refined, as the other readings
            no longer fit afterwards.
        coarse_bits: 2 or 3 where the reading at so many bits, fewer than `fit_bits`, will be served too; not together
            with `unshrink`.
        inputs: of each of the matrices `[n, N, K]`, where they are known: the error of the outputs is minimized then,
            and not that of the weights; readings finer than `fit_bits` are of no use.
        form: how the grids of these weights will be stored; None for two float16.

    `"rtn"` spans the range of each group, and looks at no coarser reading and no inputs.
    """
    form = form or HalfGrids()
    targets = (Target(fit_bits),) if coarse_bits is None else (Target(fit_bits), COARSE[coarse_bits])
    *lead, columns = weights.shape
    if method == "als" and inputs is not None:
        known = InputsOfMatrices.of(inputs, columns)
        return Code(*fed_back(weights.float(), group_size, targets, unshrink, form, known))
    groups = weights.float().contiguous().view(*lead, columns // group_size, group_size)
    grid = range_grid(groups, fit_bits, form) if method == "rtn" else fitted_grid(groups, targets, form)
    values = nearest(groups, grid)
    if unshrink and method == "als":
        grid = unshrunk(groups, values, grid, fit_bits, form)
    return Code(values.view(*lead, columns), *(part.squeeze(-1) for part in grid))


def dequantize(values: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The weights `[..., K]` that codes stand for at `bits` bits, in float32; the bits below must be zero."""
    *lead, num_groups = scale.shape
    scale, minimum = scale.float()[..., None], minimum.float()[..., None]
    groups = values.view(*lead, num_groups, -1).float()
    return (groups * (scale / 16) + (minimum + scale * center(bits))).view(*lead, -1)


def dequantize_at(code: Code, bits: int) -> Tensor:
    """The weights `[..., K]` that a whole code stands for when it is read at `bits` bits; lower bits are ignored."""
    return dequantize(code.values & (0xFF << (8 - bits) & 0xFF), code.scale, code.minimum, bits)


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
