"""A CUDA graph played on a CPU: what PyTorch was asked to do is written down, undone, and done again by every replay.

A capture computes nothing, so whatever it wrote is put back. A replay does the operators that were written down, on
the tensors that they met then, and never what Python decided between them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

captures: list["Recorder"] = []
"""Those that were made, in order."""


class Recorder(TorchDispatchMode):
    """Writes down operators while they run, and what memory held before they wrote to it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                self._before.setdefault(value.untyped_storage().data_ptr(), (whole, whole.clone()))
        output = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, output))
        return output

    def undo(self) -> None:
        """Put back what was written."""
        for memory, before in self._before.values():
            memory.copy_(before)

    def replay(self) -> None:
        """Do it all again, into the same tensors."""
        for func, args, kwargs, output in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def record(work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """In the place of `captured_decode.record`."""
    recorder = Recorder()
    with recorder:
        output = work()
    recorder.undo()
    captures.append(recorder)
    return recorder.replay, output
