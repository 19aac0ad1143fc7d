"""`DynaExqConfig`: the options as Transformers passes them about, mutable and kept in config.json.

`settings()` turns them into the frozen, validated `Settings` that everything else uses.
"""

import logging
import os
from dataclasses import fields
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynaexq.checkpoint import FORMAT_VERSION
from dynaexq.errors import CheckpointError, SettingsError
from dynaexq.hf.compat import take_loading_attributes
from dynaexq.settings import Settings

logger = logging.getLogger(__name__)

METHOD = "dynaexq"
BUDGET_VARIABLE = "DYNAEXQ_HBM_BUDGET"

OF_THE_MACHINE = {"device", "host_copy", "calibration"}
"""Dials that say nothing about a model, and are not kept with it."""

RENAMED = {"margin": "hysteresis", "tick_every": "update_interval", "traffic_limit": "copy_rate_limit"}
"""Options of checkpoints that were written before these had their names."""

_DEFAULTS = {field.name: field.default for field in fields(Settings)}

PACKED_FIELDS = {"format_version", "tiers", "group_size", "quantizer"}


@register_quantization_config(METHOD)
class DynaExqConfig(QuantizationConfigMixin):
    """How the experts of a model are kept, for `from_pretrained(..., quantization_config=DynaExqConfig(...))`.

    Takes every field of `dynaexq.Settings` as a keyword argument. All of them are loading attributes: on a checkpoint
    that has a configuration of its own, those given here win over those stored there. Where `hbm_budget` is not
    given, the environment variable `DYNAEXQ_HBM_BUDGET` is asked before the stored value.

    Args:
        packed: what the experts of a packed checkpoint are stored as; written by `save_pretrained`, not by hand.

    Raises:
        SettingsError: an unknown option, or a value that one cannot take.
        CheckpointError: the checkpoint was written in a format of another version.
    """

    def __init__(self, *, packed: dict[str, Any] | None = None, **options: Any):
        options.pop("quant_method", None)
        self.quant_method = METHOD
        self.packed = packed
        self.options = options
        self.given: dict[str, Any] = {}
        if packed is not None:
            self._check_packed(packed)
        self.settings(stored=False)

    def settings(self, stored: bool) -> Settings:
        """The options, validated.

        Args:
            stored: whether they come from a checkpoint, so that those given now, and the environment, win over them.
        """
        variable = os.environ.get(BUDGET_VARIABLE)
        environment = {"hbm_budget": variable} if variable else {}
        options = self.options | environment if stored else environment | self.options
        return Settings.from_options(options | self.given | self._fixed())

    def _fixed(self) -> dict[str, Any]:
        """Dials that the codes of a packed checkpoint have settled."""
        fixed = {name: self.packed[name] for name in ("group_size", "quantizer")} if self.packed else {}
        for name, value in fixed.items():
            if self.given.get(name, value) != value:
                raise SettingsError(
                    f"{name}={self.given[name]!r} was asked for, and the checkpoint is packed with {value!r}; leave "
                    "it out, or quantise the 16-bit source again"
                )
        return fixed

    def stored_tiers(self) -> tuple[str, ...] | None:
        """The ladder that a packed checkpoint holds, or None for 16-bit weights."""
        return tuple(self.packed["tiers"]) if self.packed else None

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a configuration given to `from_pretrained` changes in a stored one: all that it sets."""
        return self.options | self.given

    def to_dict(self) -> dict[str, Any]:
        """As config.json keeps it. A policy that is a function cannot be kept there."""
        options = {name: option for name, option in (self.options | self.given).items() if name not in OF_THE_MACHINE}
        if callable(options.get("policy")):
            logger.warning("policy is a function and is not saved; pass it again when the model is loaded")
            options = {name: value for name, value in options.items() if name != "policy"}
        stored = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"quant_method": METHOD, **stored} | ({"packed": self.packed} if self.packed else {})

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: what has its default value is never kept."""
        return self.to_dict()

    def __getattr__(self, name: str) -> Any:
        if name not in _DEFAULTS:
            raise AttributeError(f"DynaExqConfig has no attribute {name!r}; the options are {', '.join(_DEFAULTS)}")
        return (self.options | self.given).get(name, _DEFAULTS[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DEFAULTS:
            self.given[name] = value
        else:
            super().__setattr__(name, value)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration that `to_dict` gave, or that a user wrote as a plain dict."""
        config = cls(**{RENAMED.get(name, name): value for name, value in config_dict.items()})
        return (config, kwargs) if return_unused_kwargs else config

    @staticmethod
    def _check_packed(packed: Any) -> None:
        if not isinstance(packed, dict) or not packed.keys() >= PACKED_FIELDS:
            raise CheckpointError(
                f"config.json: expected packed to hold {', '.join(sorted(PACKED_FIELDS))}, got {packed!r}; "
                "fetch the file again"
            )
        if packed["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint is packed in format version {packed['format_version']!r}, and this dynaexq reads "
                f"{FORMAT_VERSION}; install the version of dynaexq that wrote it, or quantise the source again"
            )
        Settings(tiers=packed["tiers"], group_size=packed["group_size"], quantizer=packed["quantizer"])


take_loading_attributes(DynaExqConfig)
