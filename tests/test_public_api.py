"""The front door: what `import dynaexq` offers, and that it is documented."""

import inspect
import subprocess
import sys

import dynaexq

PUBLIC = {
    "BudgetError", "CheckpointError", "ClosedError", "DynaExqConfig", "DynaExqError", "DynaExqMoE", "Health",
    "HotnessError", "InputError", "MemoryPlan", "PatchError", "QuantizationError", "Recording",
    "ReentryError", "Report", "Runtime", "Settings", "SettingsError", "StoreError", "TraceError", "UnpatchError",
    "UnsupportedModelError", "Verdict", "__version__", "calibrate", "patch", "unpatch",
}  # fmt: skip
RUNTIME = {
    "memory", "tiers", "hotness", "stats", "report", "routed_mass", "tick", "drain", "freeze", "thaw", "set_budget",
    "trace", "verdict", "close", "warm_start", "save_hotness", "load_hotness", "plan", "settings", "devices",
    "follows_replays", "health", "snapshot", "pin", "set_policy",
}  # fmt: skip


def test_the_public_names_are_exactly_these():
    assert set(dynaexq.__all__) == PUBLIC
    assert sorted(dynaexq.__all__) == list(dynaexq.__all__)
    assert all(hasattr(dynaexq, name) for name in PUBLIC)


def test_every_public_thing_says_what_it_is():
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(dynaexq, name)), f"{name} has no docstring"
    for name in RUNTIME:
        assert inspect.getdoc(getattr(dynaexq.Runtime, name)), f"Runtime.{name} has no docstring"


def test_the_runtime_has_what_users_call_and_nothing_else():
    assert {name for name in vars(dynaexq.Runtime) if not name.startswith("_")} == RUNTIME


def test_every_error_is_a_dynaexq_error_and_a_familiar_one():
    errors = {name for name in PUBLIC if name.endswith("Error")}
    for name in errors:
        assert issubclass(getattr(dynaexq, name), dynaexq.DynaExqError)
    assert issubclass(dynaexq.SettingsError, ValueError)
    assert issubclass(dynaexq.BudgetError, ValueError)
    assert issubclass(dynaexq.UnsupportedModelError, TypeError)


def test_importing_loads_neither_plots_nor_quantization_libraries():
    code = "import sys, dynaexq; print([m for m in ('matplotlib', 'bitsandbytes') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
