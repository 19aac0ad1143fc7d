"""Rows that decoder layers have yet to compute: a tensor that is computed when anything but a layer touches it.

Python is slow behind every layer whose weights have gone through the caches. So a layer that is not the last leaves
its work with its output, the next adds its own, and the last has all of it done in one call. What touches the tensor
before that, be it a hook, an operator between two layers, or a norm after fewer of them, has it done then: operators
and attributes of a tensor come by `__torch_function__`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree


class PendingRows(Tensor):
    """The output of a layer, `[batch, length, H]`.

    Attributes:
        memory: where it will be, or is.
        work: what is left to do, for the layer that comes next; called, it does it, once.
    """

    memory: Tensor
    work: Callable[[], None]

    @staticmethod
    def of(memory: Tensor, work: Callable[[], None]) -> "PendingRows":
        """`memory`, as the rows that `work` will write to it."""
        rows: PendingRows = Tensor._make_subclass(PendingRows, memory)
        rows.memory, rows.work = memory, work
        return rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map_only(PendingRows, computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def computed(rows: Tensor) -> Tensor:
    """The rows, as a plain tensor."""
    if not isinstance(rows, PendingRows):
        return rows
    rows.work()
    return rows.memory
