"""Mixture-of-experts models under a hard memory budget: per-expert precision that follows the traffic.

>>> import dynaexq
>>> runtime = dynaexq.patch(model, hbm_budget="20GiB")   # doctest: +SKIP
>>> model.generate(**inputs)                             # doctest: +SKIP

Importing this package is cheap: what is named below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynaexq.errors import (
    BudgetError,
    CheckpointError,
    ClosedError,
    DynaExqError,
    HotnessError,
    InputError,
    PatchError,
    QuantizationError,
    ReentryError,
    SettingsError,
    StoreError,
    TraceError,
    UnpatchError,
    UnsupportedModelError,
)
from dynaexq.hf import registration

if TYPE_CHECKING:
    from dynaexq.hf.calibration import calibrate
    from dynaexq.hf.config import DynaExqConfig
    from dynaexq.hf.patcher import patch, unpatch
    from dynaexq.policy.benefit import Verdict
    from dynaexq.runtime.health import Health
    from dynaexq.runtime.moe import DynaExqMoE
    from dynaexq.runtime.runtime import Runtime
    from dynaexq.settings import Settings
    from dynaexq.traces.recorder import Recording
    from dynaexq.types import MemoryPlan
    from dynaexq.views.report import Report

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "DynaExqConfig",
    "DynaExqError",
    "DynaExqMoE",
    "Health",
    "HotnessError",
    "InputError",
    "MemoryPlan",
    "PatchError",
    "QuantizationError",
    "Recording",
    "ReentryError",
    "Report",
    "Runtime",
    "Settings",
    "SettingsError",
    "StoreError",
    "TraceError",
    "UnpatchError",
    "UnsupportedModelError",
    "Verdict",
    "__version__",
    "calibrate",
    "patch",
    "unpatch",
]

_HOME = {
    "DynaExqConfig": "dynaexq.hf.config",
    "DynaExqMoE": "dynaexq.runtime.moe",
    "Health": "dynaexq.runtime.health",
    "MemoryPlan": "dynaexq.types",
    "Recording": "dynaexq.traces.recorder",
    "Report": "dynaexq.views.report",
    "Runtime": "dynaexq.runtime.runtime",
    "Settings": "dynaexq.settings",
    "Verdict": "dynaexq.policy.benefit",
    "calibrate": "dynaexq.hf.calibration",
    "patch": "dynaexq.hf.patcher",
    "unpatch": "dynaexq.hf.patcher",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynaexq' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


registration.announce()
