"""Give a live module another class, and take it back.

The new class derives from a mixin and from the module's own class. So the module stays the object that its parents,
hooks and users know, keeps its parameter paths and everything its family defines, and is still an instance of it;
only what the mixin overrides changes. `release` undoes it exactly.
"""

from functools import cache
from typing import Any

from torch import nn


def adopt(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Make `module` an instance of `mixin` as well, in place."""
    module.__class__ = _adopted_class(mixin, type(module))  # type: ignore[arg-type]


def release(module: nn.Module) -> None:
    """Give an adopted module its own class back."""
    module.__class__ = type(module).__bases__[1]


@cache
def _adopted_class(mixin: Any, family: Any) -> Any:
    # The mixin's name stays in front, so that a printed model shows where it was patched.
    name = f"{mixin.__name__}[{family.__name__}]"
    return type(name, (mixin, family), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})
