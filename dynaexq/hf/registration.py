"""Make Transformers know dynaexq, without a second of imports in programs that never load a model.

Transformers finds both in two tables of `transformers.quantizers.auto`. `announce` puts stand-ins there, as soon as
that module is imported to load a model; they import the real classes when a checkpoint asks for them.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"


class StandInConfig:
    """The configuration, where it has not been imported yet."""

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """What `DynaExqConfig.from_dict` gives."""
        from dynaexq.hf.config import DynaExqConfig

        return DynaExqConfig.from_dict(*args, **kwargs)


def stand_in_quantizer(*args: Any, **kwargs: Any) -> Any:
    """A `DynaExqQuantizer`, where it has not been imported yet."""
    from dynaexq.hf.quantizer import DynaExqQuantizer

    return DynaExqQuantizer(*args, **kwargs)


def announce() -> None:
    """Register with Transformers: at once if its tables are imported already, else when they are."""
    tables = sys.modules.get(TABLES)
    if tables is not None and hasattr(tables, "AUTO_QUANTIZER_MAPPING"):
        _fill(tables)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module, once: the tables, which are filled when they have been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module: ModuleType) -> None:
                execute(module)
                _fill(module)

            spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]
        return spec


def _fill(tables: ModuleType) -> None:
    from dynaexq.checkpoint import QUANT_METHOD

    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, StandInConfig)
    tables.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, stand_in_quantizer)
