"""Bytes that a model's weights take, each counted once. It knows tensors and modules, no family."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside them once a layer has run."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = vars(module).get("state")
        if type(state).__name__ == "MatmulLtState":
            yield from _attached(state)


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of `tensors` and of what hangs on them; those that share their memory, as tied weights do, count once.

    Of a tensor that is spread over ranks only what this rank holds is counted.
    """
    # On the meta device there is no memory to share, and none to tell apart by.
    here = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    found = (part for tensor in here for part in (tensor, *_attached(tensor)))
    return sum({part.data_ptr() or id(part): part.nbytes for part in found}.values())


def _attached(thing: Any) -> Iterator[Tensor]:
    """Tensors among the attributes of a quantized weight, and of the states it keeps: scales, code books."""
    for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__name__ == "QuantState":
            yield from _attached(value)
