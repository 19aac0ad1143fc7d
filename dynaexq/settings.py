"""Every option of dynaexq in one frozen object, validated once. It knows nothing of models, devices or tensors."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from dynaexq.errors import SettingsError
from dynaexq.types import BITS

_UNITS = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]+)")

DEFAULT_HALF_LIFE = 128


def parse_bytes(size: int | str, option: str = "hbm_budget") -> int:
    """Bytes of `20 * 2**30`, `"20GiB"` (powers of 1024) or `"20GB"` (powers of 1000).

    Raises:
        SettingsError: not a positive whole number of bytes and not a number directly followed by a known unit.
    """
    expected = f'{option} must be a positive number of bytes or a size such as "20GiB" or "20GB"'
    count = size
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if not match or match[2] not in _UNITS:
            raise SettingsError(
                f"{expected}, got {size!r}; write the number and one of {', '.join(_UNITS)} without a space"
            )
        count = int(Fraction(match[1]) * _UNITS[match[2]])
    if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
        raise SettingsError(f"{expected}, got {size!r}")
    return count


@dataclass(frozen=True)
class Settings:
    """How precision is managed. Field names are the keyword arguments of `dynaexq.patch`.

    Attributes:
        hbm_budget: ceiling on the device bytes of all the model's weights: `"20GiB"`, `"20GB"`, bytes, or `"auto"`.
        tiers: `"auto"`, or the precisions of an expert, the base first: one or two of int2, int4, int8, fp16.
        device: where the model computes; None takes the accelerator if there is one, else the CPU.
        allocation: `"global"` lets layers compete for upgrade slots, `"per_layer"` gives each the same number.
        policy: `"topn"`, `"threshold"`, `"frozen"`, or a callable `(score, upgraded, slots) -> wanted` over
            `[num_layers, num_experts]` arrays (see `dynaexq.policy.precision`).
        tau_h, tau_c: hotness above which `"threshold"` promotes, and below which it demotes.
        half_life: tokens after which an observation weighs half in the hotness; 128 unless `alpha` is given.
        alpha: the paper's factor instead, kept share of the old hotness at every step; in [0, 1).
        hysteresis: relative hysteresis; a newcomer must beat an incumbent's score by this share.
        auto_pause: whether `"topn"` holds still until following the traffic would pay, and again where it no longer
            does (see `dynaexq.watch`).
        update_interval: forward passes between two decisions; fewer where these see more than eight tokens each.
        copy_rate_limit: bytes a second moved to the device (`"500MB"` or an int), or a share in (0, 1] of the
            measured link (a float); None moves at most 64 MiB a tick.
        host_copy: where upgrade bytes wait: `"ram"`, `"pinned"` (page-locked, CUDA only), `"disk"`, or `"auto"`: in
            the checkpoint where that holds the very bytes, else in RAM.
        group_size: weights that share one scale: 32, 64 or 128.
        quantizer: `"als"` (alternating least squares) or `"rtn"` (round to nearest, fast).
        calibration: path of what `dynaexq.calibrate` gathered of the experts' inputs: quantising then minimises the
            error of the outputs. None minimises that of the weights.
        dense: None leaves the dense linear layers as they are, `"bnb-4bit"` and `"bnb-8bit"` quantise them with
            bitsandbytes.
        max_context, max_batch: the tokens and sequences that `hbm_budget="auto"` leaves room for.
    """

    hbm_budget: int | str = "auto"
    tiers: str | tuple[str, ...] = "auto"
    device: str | None = None
    allocation: str = "global"
    policy: str | Callable[..., Any] = "topn"
    tau_h: float | None = None
    tau_c: float | None = None
    half_life: float | None = None
    alpha: float | None = None
    hysteresis: float = 0.5
    auto_pause: bool = True
    update_interval: int = 32
    copy_rate_limit: int | float | str | None = None
    host_copy: str = "auto"
    group_size: int = 64
    quantizer: str = "als"
    calibration: str | os.PathLike[str] | None = None
    dense: str | None = None
    max_context: int = 4096
    max_batch: int = 1

    def __post_init__(self) -> None:
        if self.hbm_budget != "auto":
            object.__setattr__(self, "hbm_budget", parse_bytes(self.hbm_budget))
        object.__setattr__(self, "tiers", _checked_tiers(self.tiers))
        _one_of("allocation", self.allocation, ("global", "per_layer"))
        _one_of("host_copy", self.host_copy, ("auto", "ram", "pinned", "disk"))
        _one_of("group_size", self.group_size, (32, 64, 128))
        _one_of("quantizer", self.quantizer, ("als", "rtn"))
        if self.calibration is not None:
            if not isinstance(self.calibration, str | os.PathLike):
                raise SettingsError(f"calibration must be the path of a file of moments, got {self.calibration!r}")
            if self.quantizer == "rtn":
                raise SettingsError('quantizer="rtn" rounds and heeds no calibration; leave one of them out')
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
        if self.dense is not None:
            _one_of("dense", self.dense, ("bnb-4bit", "bnb-8bit"))
        if not callable(self.policy):
            _one_of("policy", self.policy, ("topn", "threshold", "frozen"))
        if not isinstance(self.auto_pause, bool):
            raise SettingsError(f"auto_pause must be True or False, got {self.auto_pause!r}")
        for option in ("update_interval", "max_context", "max_batch"):
            _whole_number(option, getattr(self, option))
        _number("hysteresis", self.hysteresis, low=0.0)
        self._check_thresholds()
        self._check_decay()
        self._check_traffic_limit()

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Settings":
        """Settings from keyword arguments; an unknown name raises a SettingsError that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise SettingsError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}")
        return cls(**options)

    def _check_thresholds(self) -> None:
        if self.policy != "threshold":
            if self.tau_h is not None or self.tau_c is not None:
                raise SettingsError(
                    f'tau_h and tau_c belong to policy="threshold", got policy={self.policy!r}, '
                    f"tau_h={self.tau_h!r} and tau_c={self.tau_c!r}; leave them out or choose that policy"
                )
            return
        if self.tau_h is None or self.tau_c is None:
            raise SettingsError(
                'policy="threshold" needs both tau_h (promote above) and tau_c (demote below), '
                f"got tau_h={self.tau_h!r} and tau_c={self.tau_c!r}"
            )
        _number("tau_c", self.tau_c, low=0.0)
        _number("tau_h", self.tau_h, low=self.tau_c)

    def _check_decay(self) -> None:
        if self.alpha is not None and self.half_life is not None:
            raise SettingsError(
                f"give half_life (tokens) or alpha (a step), not both, got half_life={self.half_life!r} and "
                f"alpha={self.alpha!r}: each sets how fast hotness forgets"
            )
        if self.alpha is not None:
            _number("alpha", self.alpha, low=0.0)
            if self.alpha >= 1:
                raise SettingsError(f"alpha must be below 1, got {self.alpha!r}: at 1 nothing new is ever learnt")
            return
        if self.half_life is None:
            object.__setattr__(self, "half_life", float(DEFAULT_HALF_LIFE))
        _number("half_life", self.half_life, low=0.0, exclusive=True)

    def _check_traffic_limit(self) -> None:
        limit = self.copy_rate_limit
        if limit is None or (isinstance(limit, float) and 0 < limit <= 1):
            return
        if isinstance(limit, float):
            raise SettingsError(f"copy_rate_limit as a share of the link must lie in (0, 1], got {limit!r}")
        object.__setattr__(self, "copy_rate_limit", parse_bytes(limit, "copy_rate_limit"))


def _checked_tiers(tiers: Any) -> str | tuple[str, ...]:
    if tiers == "auto":
        return "auto"
    if isinstance(tiers, str) or not isinstance(tiers, tuple | list) or not tiers:
        raise SettingsError(f'tiers must be "auto" or a tuple such as ("int4", "int8"), the base first, got {tiers!r}')
    for name in tiers:
        _one_of("a tier", name, tuple(BITS))
    bits = [BITS[name] for name in tiers]
    if bits != sorted(set(bits)):
        raise SettingsError(
            f"tiers must rise from the base, each once, got {tuple(tiers)}; did you mean {_sorted(tiers)}?"
        )
    if len(tiers) > 2:
        raise SettingsError(f"tiers takes a base and at most one upgrade, got {tuple(tiers)}; drop one of them")
    return tuple(tiers)


def _sorted(tiers: Any) -> tuple[str, ...]:
    return tuple(sorted(set(tiers), key=BITS.__getitem__))


def _one_of(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in choices:
        raise SettingsError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _whole_number(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{option} must be a whole number of at least 1, got {value!r}")


def _number(option: str, value: Any, low: float, exclusive: bool = False) -> None:
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or value < low or (exclusive and value == low):
        raise SettingsError(
            f"{option} must be a number {'above' if exclusive else 'of at least'} {low:g}, got {value!r}"
        )
