"""Tensors of models and of caches, and the bytes of weights, each counted once. It knows no family."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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


class Reached(NamedTuple):
    """A tensor inside something: the names and indices that lead to it, and what it lies in, the outermost first."""

    way: tuple[Any, ...]
    owners: tuple[Any, ...]
    tensor: Tensor


def reachable_tensors(thing: Any) -> Iterator[Reached]:
    """Every tensor that can be reached from a cache, through attributes, dicts, lists and tuples, but no module."""
    return _reached(thing, (), (), set())


def _reached(thing: Any, way: tuple[Any, ...], owners: tuple[Any, ...], seen: set[int]) -> Iterator[Reached]:
    if isinstance(thing, Tensor):
        yield Reached(way, owners, thing)
        return
    if id(thing) in seen or isinstance(thing, nn.Module | type):
        return
    seen.add(id(thing))
    children = dict(enumerate(thing)) if isinstance(thing, list | tuple) else attributes(thing)
    for name, child in list(children.items()):
        yield from _reached(child, (*way, name), (*owners, thing), seen)


def attributes(thing: Any) -> dict[Any, Any]:
    """The entries of a dict, or the attributes that an object itself has."""
    return thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})


def _attached(thing: Any) -> Iterator[Tensor]:
    """Tensors among the attributes of a quantized weight, and of the states it keeps: scales, code books."""
    for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__name__ == "QuantState":
            yield from _attached(value)
