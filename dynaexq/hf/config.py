"""`DynaExqConfig`: the options as users and Transformers handle them, mutable and kept in config.json.

`settings()` turns them into the frozen, validated `Settings` that everything else is given.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynaexq.checkpoint import QUANT_METHOD, READ_VERSIONS
from dynaexq.errors import CheckpointError, SettingsError
from dynaexq.hf.compat import take_loading_attributes
from dynaexq.settings import DENSE_FORMATS, OPTION_NAMES, RENAMED, Options, Settings, resolve, strict_init

logger = logging.getLogger(__name__)

OF_THE_MACHINE = {"device", "host_copy", "calibration", "activations"}
"""Options that say nothing about a model, and are not kept with it."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PACKED_FIELDS = {"format_version", "tiers", "group_size", "quantizer"}


@strict_init
@dataclass(kw_only=True, repr=False, eq=False)
class DynaExqConfig(Options, QuantizationConfigMixin):
    """How the experts of a model are kept, for `from_pretrained(..., quantization_config=DynaExqConfig(...))`.

    On a checkpoint that has a configuration of its own, the options given here win over those stored there; see
    `settings.resolve`. Beside the options below there is one field:

        packed: what the experts of a packed checkpoint are stored as; written by `save_pretrained`, not by hand.

    Raises:
        SettingsError: an unknown option, or a value that one cannot take.
        CheckpointError: the checkpoint was written in a format of another version.

    Examples:
        >>> DynaExqConfig(hbm_budget="20GiB", tiers=("int4", "int8")).settings().hbm_budget
        21474836480
    """

    packed: dict[str, Any] | None = None
    quant_method: Any = field(default=QUANT_METHOD, init=False)

    def __post_init__(self) -> None:
        if self.packed is not None:
            _check_packed(self.packed)
        Settings(**{name: getattr(self, name) for name in OPTION_NAMES})

    def settings(self, stored: bool = False) -> Settings:
        """The options, validated.

        Args:
            stored: whether those that the object was made with come from a checkpoint, so that the environment and
                those assigned since win over them.

        Raises:
            SettingsError: an option that the codes of a packed checkpoint have settled was asked to be another.
        """
        named, assigned = self.named_options(), self.__dict__.get("_assigned", set())
        arguments = {name: value for name, value in named.items() if not stored or name in assigned}
        packed = self._settled_by_packing()
        for name, value in packed.items():
            if arguments.get(name, value) != value:
                raise SettingsError(
                    f"{name}={arguments[name]!r} was asked for, and the checkpoint is packed with {value!r}; leave "
                    "it out, or quantize the 16-bit source again"
                )
        return resolve(arguments | packed, named)

    def named_options(self) -> dict[str, Any]:
        """The options that were named, when the object was made or since; the others have their defaults."""
        return {name: getattr(self, name) for name in OPTION_NAMES if name in self._given}

    def updated(self, **options: Any) -> "DynaExqConfig":
        """Another configuration, with those of `options` that are not None in place of its own."""
        changed = {name: value for name, value in options.items() if value is not None}
        return DynaExqConfig(packed=self.packed, **{**self.named_options(), **changed})

    def stored_tiers(self) -> tuple[str, ...] | None:
        """The tiers that a packed checkpoint holds, or None for 16-bit weights."""
        return tuple(self.packed["tiers"]) if self.packed else None

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of 16-bit experts and of biases in a packed checkpoint; None where it is the model's."""
        name = (self.packed or {}).get("dtype")
        return DTYPES[name] if name is not None else None

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options that override those stored in a checkpoint: all that were named."""
        return self.named_options()

    def to_dict(self) -> dict[str, Any]:
        """As config.json keeps it: what was named. A policy that is a function cannot be kept there."""
        options = {name: value for name, value in self.named_options().items() if name not in OF_THE_MACHINE}
        if callable(options.get("policy")):
            logger.warning("policy is a function and is not saved; pass it again when the model is loaded")
            del options["policy"]
        stored = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"quant_method": QUANT_METHOD, **stored} | ({"packed": self.packed} if self.packed else {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration that `to_dict` gave, or that a user wrote as a plain dict."""
        options = {RENAMED.get(name, name): value for name, value in config_dict.items() if name != "quant_method"}
        config = cls(**options)
        return (config, kwargs) if return_unused_kwargs else config

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in OPTION_NAMES and "_given" in self.__dict__:
            self._given.add(name)
            self.__dict__.setdefault("_assigned", set()).add(name)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def _settled_by_packing(self) -> dict[str, Any]:
        return _settled_by(self.packed) if self.packed else {}


def as_config(config: DynaExqConfig | Mapping[str, Any] | None) -> DynaExqConfig:
    """What a caller gave as `config`: one, a dict of options, or nothing.

    Raises:
        SettingsError: something else, or an unknown option.
    """
    if isinstance(config, DynaExqConfig):
        return config
    if config is not None and not isinstance(config, Mapping):
        raise SettingsError(
            f"config must be a DynaExqConfig or a dict of options, got {type(config).__name__}; "
            "write config=DynaExqConfig(...)"
        )
    return DynaExqConfig.from_dict(dict(config or {}))


def _check_packed(packed: Any) -> None:
    if not isinstance(packed, dict) or not packed.keys() >= PACKED_FIELDS:
        raise CheckpointError(
            f"config.json: expected packed to hold {', '.join(sorted(PACKED_FIELDS))}, got {packed!r}; "
            "fetch the file again"
        )
    if packed["format_version"] not in READ_VERSIONS:
        raise CheckpointError(
            f"the checkpoint is packed in format version {packed['format_version']!r}, and this dynaexq reads "
            f"{READ_VERSIONS[0]} to {READ_VERSIONS[-1]}; install the version of dynaexq that wrote it, or quantize "
            "the source again"
        )
    if packed.get("dtype", "float16") not in DTYPES:
        raise CheckpointError(
            f"config.json: expected packed to have a dtype among {', '.join(DTYPES)}, got {packed['dtype']!r}; fetch "
            "the file again"
        )
    Settings(tiers=packed["tiers"], **_settled_by(packed))


def _settled_by(packed: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the bytes of a packed checkpoint leave no choice of."""
    settled = {
        "group_size": packed["group_size"],
        "quantizer": packed["quantizer"],
        "scale_bits": packed.get("scale_bits", 16),  # the first version of the format knew no other
    }
    if packed.get("dense") in DENSE_FORMATS:
        settled["head"] = packed.get("head", "int8")  # nor did the first two
    return settled


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = DynaExqConfig  # in the place of the stand-in
take_loading_attributes(DynaExqConfig)
DynaExqConfig.__doc__ = f"{DynaExqConfig.__doc__}\n{(Options.__doc__ or '').partition('Raises:')[0]}"  # for help()
