"""Decoding as CUDA graphs: the plain forward captured, where `generate` would have it compiled.

With a static cache on a GPU `generate` asks the model for a compiled forward for its tokens. A compiler takes minutes
for a model of many layers; a graph of the forward as it stands takes as long as one forward, and leaves as little to
the host afterwards. The first token of a shape is computed as ever, the second is captured, all others are replayed.
Every call of `generate` captures anew, because it brings a new cache, so nothing that changes between two is missed.

A graph does what the device did, and nothing that Python did. So what lets Python take part (hooks of others, wrapped
forwards, a cache that counts in Python or changes its tensors, several devices) is left to the compiler, and so is
whatever cannot be captured; a compiler that was asked for by name is given. How precision follows the replays is not
known here (`memory.graph_sync`).
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from dynaexq.hf.compat import is_capturing_hook, is_distributed
from dynaexq.hf.model_patch import ModelPatch, by_transformers
from dynaexq.runtime.door import CACHE_NAMES

logger = logging.getLogger(__name__)

MOST_POSITIONS = 16
"""Tokens of a sequence up to which a forward is captured: decoding, also of guesses; a prompt's are computed once."""

_CHANGES = "its cache is changed in Python"

Forward = Callable[..., Any]
Recorded = tuple[Callable[[], None], Any]
"""What replays a forward, and the output of which every replay writes the tensors."""


def compiled_call(patch: ModelPatch, compile_config: Any = None) -> Forward:
    """What `generate` calls for its tokens: graphs, or the compiler where it was asked for or Python takes part."""
    compiled = partial(by_transformers, patch, "get_compiled_call", compile_config)
    if compile_config is not None or not is_capturable(patch.model):
        return compiled()
    return CapturedForward(patch.model, compiled)


def is_capturable(model: Any) -> bool:
    """Whether a graph of the forward does all that the forward does: one GPU, and no Python of others inside."""
    if is_distributed(model) or not on_one_gpu(model):
        return False
    return all(map(_has_no_guests, model.modules()))


def on_one_gpu(model: nn.Module) -> bool:
    """Whether all weights lie on the same CUDA device."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return len(devices) == 1 and devices.pop().type == "cuda"


def record(work: Callable[[], Any], device: torch.device) -> Recorded:
    """Capture `work`. Raises RuntimeError where CUDA cannot."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # Other threads copy and look at words meanwhile, which is none of this capture's business.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = work()
    return graph.replay, output


class CapturedForward:
    """The forward of a model, replayed where it has been captured for arguments of the same shape.

    Args:
        model: under `torch.no_grad`, as in `generate`.
        compiled: makes the forward that is called from then on once capturing has turned out to be impossible.
    """

    def __init__(self, model: Any, compiled: Callable[[], Forward]):
        self._model, self._make_compiled = model, compiled
        self._compiled: Forward | None = None
        self._steady: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, **arguments: Any) -> Any:
        if self._compiled is not None:
            return self._compiled(**arguments)
        shape = shape_of(arguments)
        if shape is None:
            return self._model(**arguments)
        if shape not in self._steady:
            return self._observed(shape, arguments)
        graph = self._graph(shape, arguments)
        return self(**arguments) if graph is None else graph.replay(arguments)

    def _observed(self, shape: Hashable, arguments: dict[str, Any]) -> Any:
        """Run the forward, and see whether its cache stays the same objects."""
        is_unchanged = _Watch(_cache_among(arguments))
        output = self._model(**arguments)
        if is_unchanged():
            self._steady.add(shape)
        else:
            self._leave_to_compiler(_CHANGES)
        return output

    def _graph(self, shape: Hashable, arguments: dict[str, Any]) -> "_Graph | None":
        """The graph for arguments of this shape; None, and the compiler from now on, where there can be none."""
        try:
            if shape not in self._graphs:
                self._graphs[shape] = _Graph(self._model, arguments)
        except RuntimeError as error:
            self._leave_to_compiler(str(error).partition("\n")[0])
            return None
        if self._graphs[shape].is_current():
            return self._graphs[shape]
        self._leave_to_compiler(_CHANGES)
        return None

    def _leave_to_compiler(self, why: str) -> None:
        logger.warning("decoding is compiled from now on: no CUDA graph can be made of it, because %s", why)
        self._compiled, self._graphs = self._make_compiled(), {}


class _Graph:
    """One captured forward, and the tensors that it reads and writes."""

    def __init__(self, model: Any, arguments: dict[str, Any]):
        self.is_current = _Watch(_cache_among(arguments))
        given = _mapped(arguments, Tensor.clone)
        self._given = list(_tensors(given))
        self._run, self._output = record(partial(model, **given), model.device)

    def replay(self, arguments: dict[str, Any]) -> Any:
        """The output for these arguments, in tensors of its own."""
        for own, given in zip(self._given, _tensors(arguments), strict=True):
            own.copy_(given)
        self._run()
        return _mapped(self._output, Tensor.clone)


class _Watch:
    """Called, says whether a cache holds the very objects that it held when it was first seen."""

    def __init__(self, cache: Any):
        self._cache, self._held = cache, list(_held(cache))

    def __call__(self) -> bool:
        return all(now is then for now, then in zip_longest(_held(self._cache), self._held))


def shape_of(arguments: dict[str, Any]) -> Hashable | None:
    """What two calls must agree in to share a graph; None for prompts, and for what a graph cannot tell apart.

    Tensors count by shape, dtype and device, the cache by identity, all else by value.
    """
    found: list[Hashable] = []
    for name, value in arguments.items():
        if name in CACHE_NAMES and value is not None:
            if not hasattr(value, "layers"):
                return None
            found.append((name, id(value)))
            continue
        for leaf in _leaves(value):
            if isinstance(leaf, Tensor):
                found.append((name, leaf.shape, leaf.dtype, leaf.device))
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                found.append((name, type(leaf), leaf))
            else:
                return None
    return tuple(found) if _positions(arguments) <= MOST_POSITIONS else None


def _positions(arguments: dict[str, Any]) -> int:
    """Tokens of a sequence; none where there are neither words nor embeddings."""
    given = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    return max((tensor.shape[1] for tensor in given if isinstance(tensor, Tensor) and tensor.ndim > 1), default=0)


def _cache_among(arguments: dict[str, Any]) -> Any:
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def _held(cache: Any) -> Iterator[Any]:
    """Everything that the layers of a cache hold, containers and what they contain."""
    for layer in getattr(cache, "layers", ()):
        yield layer
        for value in vars(layer).values():
            yield value
            if isinstance(value, dict | list | tuple):
                yield from _leaves(value)


def _has_no_guests(module: nn.Module) -> bool:
    """Whether calling a module runs no Python but its class's, Transformers' and ours."""
    own = module.__dict__
    hooks = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return "forward" not in own and all(is_capturing_hook(hook) or _is_ours(hook) for hook in hooks)


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _leaves(value: Any) -> Iterator[Any]:
    """What lies in dictionaries and sequences, in order; their keys are the same wherever a forward is the same."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        yield value
        return
    for part in value:
        yield from _leaves(part)


def _tensors(arguments: dict[str, Any]) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(arguments) if isinstance(leaf, Tensor))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)(**{name: _mapped(part, change) for name, part in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    return value
