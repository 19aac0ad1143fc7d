"""Mixture-of-experts models under a hard memory budget: per-expert precision that follows the traffic.

>>> import dynaexq
>>> runtime = dynaexq.patch(model, hbm_budget="20GiB")   # doctest: +SKIP
>>> model.generate(**inputs)                             # doctest: +SKIP
"""

from dynaexq.errors import (
    BudgetError,
    CheckpointError,
    ClosedError,
    DynaExqError,
    HotnessError,
    PatchError,
    QuantizationError,
    SettingsError,
    StoreError,
    TraceError,
    UnpatchError,
    UnsupportedModelError,
)
from dynaexq.hf import DynaExqConfig, calibrate, patch, unpatch
from dynaexq.runtime.moe import DynaExqMoE
from dynaexq.runtime.runtime import Runtime
from dynaexq.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "DynaExqConfig",
    "DynaExqError",
    "DynaExqMoE",
    "HotnessError",
    "PatchError",
    "QuantizationError",
    "Runtime",
    "Settings",
    "SettingsError",
    "StoreError",
    "TraceError",
    "UnpatchError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "patch",
    "unpatch",
]
