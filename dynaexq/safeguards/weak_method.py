"""A method to be called later by what its object owns, which would otherwise keep the object alive for ever."""

import weakref
from collections.abc import Callable
from typing import Any


class WeakMethod:
    """Calls a bound method for as long as its object lives; after that, does nothing and returns None.

    An object that holds such a call of its own method is freed with its last outside reference, at once, and not when
    garbage is collected some time.
    """

    def __init__(self, method: Callable[..., Any]):
        self._method = weakref.WeakMethod(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self._method()
        return None if method is None else method(*args, **kwargs)
