"""Every option of dynaexq: its type, meaning and default, validated once. It knows no model, device or tensor.

`Options` is the one list of them. `DynaExqConfig` (in `hf.config`) is `Options` as users and Transformers handle it;
`Settings` is `Options` validated, with sizes in bytes, and frozen: what everything below the front door is given.
`resolve` says who wins where an option is named more than once.
"""

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

from dynaexq.errors import SettingsError
from dynaexq.types import BITS, UPGRADES

BUDGET_VARIABLE = "DYNAEXQ_HBM_BUDGET"
"""The environment variable that stands in for `hbm_budget`; see `resolve`."""

DEFAULT_HALF_LIFE = 128.0

RENAMED = {"margin": "hysteresis", "tick_every": "update_interval", "traffic_limit": "copy_rate_limit"}
"""Options as they were once called, in checkpoints and in habits."""

_UNITS = {"b": 1} | {
    (prefix + suffix).lower(): base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_UNIT_NAMES = "B, KB, KiB, MB, MiB, GB, GiB, TB or TiB"
MOST_DIGITS = 64
"""Characters of a size; there is no memory of so many bytes."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")

_Class = TypeVar("_Class", bound=type)


def strict_init(cls: _Class) -> _Class:
    """Make a dataclass refuse an unknown option with a `SettingsError`, and remember which ones were given.

    The names are kept in `_given`; the signature stays the dataclass's own.
    """
    init = cls.__init__  # type: ignore[misc]
    known = [field.name for field in fields(cls) if field.init]

    @functools.wraps(init)
    def checked(self: Any, **options: Any) -> None:
        refuse_unknown(options, known)
        init(self, **options)
        self.__dict__["_given"] = set(options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def refuse_unknown(options: Mapping[str, Any], known: list[str]) -> None:
    """Raise a SettingsError that names what was probably meant, if `options` has a name that is not `known`."""
    unknown = sorted(set(options) - set(known))
    if not unknown:
        return
    meant = [near for name in unknown for near in _near(name, known)]
    hint = f"did you mean {', '.join(meant)}? The" if meant else "the"
    raise SettingsError(f"unknown option {', '.join(unknown)}; {hint} options are {', '.join(known)}")


def _near(name: str, known: list[str]) -> list[str]:
    return [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, known, n=1)


@strict_init
@dataclass(kw_only=True)
class Options:
    """All options.

    Attributes:
        hbm_budget: ceiling on the device bytes of all the model's weights: `"20GiB"` (powers of 1024), `"20GB"`
            (powers of 1000), a number of bytes, or `"auto"`: the free memory less room for the context.
        kv_reserve: bytes of `hbm_budget` that are kept for the KV cache: None, as the budget is for weights alone; a
            size; or `"auto"`: as much as the caches of this model take at any moment, so that upgrades give way as a
            context grows and come back after it.
        tiers: `"auto"`, or the precisions of an expert, the base first: one or two of int2, int3, int4, int6, int8,
            fp16, as `types.UPGRADES` pairs them. fp16 stands for the model's own dtype.
        device: where the model computes, such as `"cpu"` or `"cuda:1"`; None takes the accelerator if there is one,
            else the CPU.
        dense: None leaves the dense linear layers as they are; `"int8"`, `"int6"` and `"int4"` pack them as experts
            are packed, the head of the model as well; `"auto"` takes whichever of these leaves the least predicted
            loss within the budget; `"bnb-8bit"` and `"bnb-4bit"` quantize them with bitsandbytes.
        head: the least precision of a packed head, `"int8"`, `"int6"` or `"int4"`; with `dense="int8"` it is int8.
        activations: what rows are rounded to where they meet codes on a CPU, group by group: `"int8"`, `"int16"`,
            which loses nothing that counts and takes up to twice the time, or `"auto"`: int16 for codes of 6
            and 8 bits, else int8. A GPU leaves them as they are, and so does a model in float32.
        policy: `"topn"`, `"threshold"`, `"frozen"`, or a callable `(score, upgraded, slots) -> wanted` over
            `[num_layers, num_experts]` arrays (see `policy.selection`).
        allocation: `"global"` lets layers compete for upgrade slots, `"per_layer"` gives each the same number.
        host_copy: where upgrade bytes wait: `"ram"`, `"pinned"` (page-locked, CUDA only), `"disk"`, or `"auto"`: in
            the checkpoint where that holds the very bytes, else in RAM.
        calibration: path of what `dynaexq.calibrate` wrote: quantizing then minimizes the error of the experts'
            and 4-bit dense layers' outputs. None minimizes that of the weights.
        half_life: tokens after which an observation weighs half in the hotness; 128 unless `alpha` is given.
        alpha: the paper's factor instead: the share of the old hotness kept per step, in [0, 1).
        num_kinds: kinds of traffic that are told apart, each with a hotness of its own, so that a request meets what
            its kind needs; 1, as `alpha`, keeps one moving average for everything.
        hysteresis: share by which a newcomer must beat an incumbent's score; at least 0.
        update_interval: forward passes between two decisions; fewer where these see more than eight tokens each, and
            one more before each prompt where kinds of traffic are told apart.
        auto_pause: whether `"topn"` holds still until following the traffic would pay, and again where it no longer
            does (see `policy.auto_pause`).
        tau_h, tau_c: hotness above which `"threshold"` promotes, and below which it demotes.
        copy_rate_limit: bytes per second copied to the device (`"500MB"` or an int), or a share in (0, 1] of the
            measured link (a float); None copies at most 64 MiB per tick, before a prompt per 32 of its tokens.
        group_size: weights that share one scale: 32, 64 or 128.
        scale_bits: 8, or 16 as earlier versions had it: of the scale of a group, and of its zero point.
        quantizer: `"als"` (alternating least squares) or `"rtn"` (round to nearest, fast).
        max_context, max_batch: the tokens and sequences that `hbm_budget="auto"` and `kv_reserve="auto"` plan for.

    Raises:
        SettingsError: an unknown option.
    """

    _given: ClassVar[set[str]]
    """Names of the options that an object was given; set by `strict_init`, and no field."""

    hbm_budget: int | str = "auto"
    kv_reserve: int | str | None = None
    tiers: str | tuple[str, ...] = "auto"
    device: str | None = None
    dense: str | None = None
    head: str = "int6"
    activations: str = "auto"
    policy: str | Callable[..., Any] = "topn"
    allocation: str = "global"
    host_copy: str = "auto"
    calibration: str | os.PathLike[str] | None = None
    half_life: float | None = None
    alpha: float | None = None
    num_kinds: int = 12
    hysteresis: float = 0.75
    update_interval: int = 32
    auto_pause: bool = True
    tau_h: float | None = None
    tau_c: float | None = None
    copy_rate_limit: int | float | str | None = None
    group_size: int = 64
    scale_bits: int = 8
    quantizer: str = "als"
    max_context: int = 4096
    max_batch: int = 1


CONTROL_OPTIONS = frozenset(
    ("policy", "allocation", "half_life", "alpha", "num_kinds", "hysteresis", "update_interval", "auto_pause",
     "tau_h", "tau_c", "copy_rate_limit")
)  # fmt: skip
"""Options that can be changed while a model runs; see `Runtime.set_policy`."""

DENSE_FORMATS = ("int8", "int6", "int4")
"""The formats of `dense` that are our own."""

OPTION_NAMES = tuple(field.name for field in fields(Options))


@strict_init
@dataclass(kw_only=True)
class Settings(Options):
    """Options, validated and frozen: sizes are bytes, tiers a tuple, and `half_life` or `alpha` is set.

    Raises:
        SettingsError: an unknown option, or a value that one cannot take.
    """

    def __post_init__(self) -> None:
        if self.hbm_budget != "auto":
            self.hbm_budget = parse_bytes(self.hbm_budget)
        if self.kv_reserve not in (None, "auto"):
            self.kv_reserve = parse_bytes(self.kv_reserve, "kv_reserve")
        self.tiers = _checked_tiers(self.tiers)
        _one_of("allocation", self.allocation, ("global", "per_layer"))
        _one_of("activations", self.activations, ("auto", "int8", "int16"))
        _one_of("host_copy", self.host_copy, ("auto", "ram", "pinned", "disk"))
        _one_of("group_size", self.group_size, (32, 64, 128))
        _one_of("scale_bits", self.scale_bits, (8, 16))
        _one_of("quantizer", self.quantizer, ("als", "rtn"))
        if self.dense is not None:
            _one_of("dense", self.dense, ("auto", *DENSE_FORMATS, "bnb-8bit", "bnb-4bit"))
        _one_of("head", self.head, DENSE_FORMATS)
        if not callable(self.policy):
            _one_of("policy", self.policy, ("topn", "threshold", "frozen"))
        if not isinstance(self.auto_pause, bool):
            raise SettingsError(f"auto_pause must be True or False, got {self.auto_pause!r}")
        for option in ("num_kinds", "update_interval", "max_context", "max_batch"):
            _whole_number(option, getattr(self, option))
        _number("hysteresis", self.hysteresis, low=0.0)
        self._check_calibration()
        self._check_thresholds()
        self._check_decay()
        self._check_copy_rate_limit()

    def with_control(self, **changes: Any) -> "Settings":
        """The same but for options of control, as `Runtime.set_policy` takes them.

        Raises:
            SettingsError: a value that one cannot take.
        """
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        if changes.get("policy", self.policy) != "threshold":
            kept |= {"tau_h": None, "tau_c": None}
        if changes.keys() & {"alpha", "half_life"}:
            kept |= {"alpha": None, "half_life": None}
        return Settings(**kept | changes)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_given" in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to {name!r}: settings are validated once; make others")
        super().__setattr__(name, value)

    def _check_calibration(self) -> None:
        if self.calibration is None:
            return
        if not isinstance(self.calibration, str | os.PathLike):
            raise SettingsError(f"calibration must be the path of a file of moments, got {self.calibration!r}")
        if self.quantizer == "rtn":
            raise SettingsError('quantizer="rtn" rounds and ignores a calibration; leave one of them out')
        self.calibration = os.fspath(self.calibration)

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
                f"give half_life (tokens) or alpha (per step), not both, got half_life={self.half_life!r} and "
                f"alpha={self.alpha!r}: each sets how fast hotness forgets"
            )
        if self.alpha is not None:
            _number("alpha", self.alpha, low=0.0)
            if self.alpha >= 1:
                raise SettingsError(f"alpha must be below 1, got {self.alpha!r}: at 1 nothing new is ever learned")
            return
        if self.half_life is None:
            self.half_life = DEFAULT_HALF_LIFE
        _number("half_life", self.half_life, low=0.0, exclusive=True)

    def _check_copy_rate_limit(self) -> None:
        limit = self.copy_rate_limit
        if limit is None or (isinstance(limit, float) and 0 < limit <= 1):
            return
        if isinstance(limit, float):
            raise SettingsError(f"copy_rate_limit as a share of the link must lie in (0, 1], got {limit!r}")
        self.copy_rate_limit = parse_bytes(limit, "copy_rate_limit")


def resolve(
    arguments: Mapping[str, Any], stored: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> Settings:
    """Settings from all places that may name an option; the first in the row that does decides.

    | option             | 1st      | 2nd                  | 3rd        | else    |
    |--------------------|----------|----------------------|------------|---------|
    | `hbm_budget`       | argument | `DYNAEXQ_HBM_BUDGET` | checkpoint | default |
    | every other option | argument |                      | checkpoint | default |

    Args:
        arguments: what the caller of `patch` or `from_pretrained` named.
        stored: what the checkpoint's config.json keeps.

    Raises:
        SettingsError: an unknown option, or a value that one cannot take.
    """
    budget = environment.get(BUDGET_VARIABLE)
    return Settings(**{**stored, **({"hbm_budget": budget} if budget else {}), **arguments})


def parse_bytes(size: int | str, option: str = "hbm_budget") -> int:
    """Bytes of `20 * 2**30`, `"20GiB"` or `"20 gib"` (powers of 1024), `"20GB"` or `"20gb"` (powers of 1000).

    Raises:
        SettingsError: not a positive whole number of bytes, and not a number with a known unit.
    """
    expected = f'{option} must be a positive number of bytes or a size such as "20GiB" or "20GB"'
    count = size
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip()) if len(size) <= MOST_DIGITS else None
        if not match or match[2].lower() not in _UNITS:
            raise SettingsError(f"{expected}, got {size[:MOST_DIGITS]!r}; write a number and {_UNIT_NAMES}")
        count = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
        raise SettingsError(f"{expected}, got {size!r}")
    return count


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
    if len(tiers) == 2 and tiers[1] not in UPGRADES[tiers[0]]:
        others = " or ".join(UPGRADES[tiers[0]])
        raise SettingsError(f"tiers: {tiers[0]} can be upgraded to {others}, got {tiers[1]!r}; take one of those")
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
