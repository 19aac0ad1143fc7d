"""Room for the KV cache under the budget: upgrades give way as a context grows, and come back when it ends.

Before each forward of the model its caches are counted, and what they may grow by is kept free on every device, for
the next 128 tokens at once; so a decoded token costs a comparison. Caches are known by weak references, and count for
as long as anything holds them. It knows no model: how many bytes a context takes is handed to it. A cache that was
allocated before its first forward, as that of continuous batching, is counted from then on; what a compiled forward
adds is not seen, and its static cache is counted whole beforehand.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynaexq.errors import BudgetError
from dynaexq.memory.tensor_bytes import reachable_tensors
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.door import CACHE_NAMES
from dynaexq.safeguards.call_lock import CallLock

STRIDES = (128, 32, 8, 0)
"""Tokens that room is made for ahead; fewer where these do not fit."""

_AHEAD: ContextVar[int] = ContextVar("_AHEAD", default=STRIDES[0])


def tokens_ahead() -> int:
    """Tokens, beyond those of the forward at work, that a cache may take room for now."""
    return _AHEAD.get()


Growth = Callable[[int, int], int]
"""Bytes that a context takes, by its tokens and its sequences."""


class _Kept(NamedTuple):
    """What room is kept for: a cache, so many sequences, and tokens ahead."""

    cache: "weakref.ref[Any] | None" = None
    rows: int = 0
    left: int = 0

    def is_for(self, cache: Any, rows: int, tokens: int) -> bool:
        """Whether a forward of so many tokens has its room."""
        is_known = cache is not None and self.cache is not None and self.cache() is cache
        return is_known and rows <= self.rows and tokens <= self.left


class CacheRoom:
    """The caches of one model, and the room that its devices keep for them.

    On several devices each keeps room for all that a forward may add, as which layer lies where is not known here.
    """

    def __init__(self, devices: Sequence[DeviceRuntime], growth: Growth):
        self._devices, self._growth = devices, growth
        self._caches = weakref.WeakSet[Any]()
        self._asking = CallLock("the room for the KV cache")
        self._at_work: dict[int, tuple[int, int]] = {}
        """Tokens and sequences of the forward of each thread."""
        self._kept = _Kept()

    def watch(self, model: nn.Module) -> Callable[[], None]:
        """Look at what each forward of `model` is given and returns; what is returned ends that."""
        handles = (
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next((value for value in given if isinstance(value, Tensor) and value.ndim > 1), None)
        if torch.compiler.is_compiling() or inputs is None:
            return
        cache = _cache_in(kwargs)
        if cache is None and kwargs.get("use_cache") is False:
            return
        rows, tokens = inputs.shape[:2]
        self._at_work[threading.get_ident()] = tokens, rows  # before a look: who makes room meanwhile counts it
        kept = self._kept  # other threads may put their own there meanwhile
        if not kept.is_for(cache, rows, tokens):
            for part in self._devices:
                part.refuse_from_within()
            with self._asking.turn():
                kept = self._make_room(cache, rows, tokens)
        self._kept = kept = kept._replace(left=kept.left - tokens)
        _AHEAD.set(self._granted_ahead(rows, tokens, kept.left))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._at_work.pop(threading.get_ident(), None)
        _AHEAD.set(STRIDES[0])  # for other models
        cache = _cache_in(kwargs)
        if cache is None:
            values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
            cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
        if cache is not None and cache not in self._caches:
            with self._asking.turn():
                self._caches.add(cache)
                self._kept = _Kept()  # it is counted before it grows again

    def _granted_ahead(self, rows: int, tokens: int, left: int) -> int:
        """Of so many tokens that are left, those that the layers may take room for at once.

        None where there are contexts beside this one: what one takes ahead another may lack.
        """
        here = threading.get_ident()
        self._at_work[here] = tokens + left, rows  # before a look: who comes now counts it
        if len(self._caches) < 2 and len(self._at_work) < 2:
            return left
        self._at_work[here] = tokens, rows
        return 0

    def _make_room(self, cache: Any, rows: int, tokens: int) -> _Kept:
        """Keep room for all caches as they are, and for `cache` with `tokens` more, and as many as the stride."""
        if cache is not None:
            self._caches.add(cache)
        added = _added(cache, tokens)
        free = _free(cache)
        has_begun = any(reached.tensor.nbytes for reached in reachable_tensors(cache))
        for ahead in STRIDES if added and has_begun else (0,):
            if self._try_reserve(max(added + ahead - free, 0), rows):
                break
        else:
            gc.collect()  # a cache in a cycle may be what is in the way
            self._reserve(max(added - free, 0), rows)
        left = tokens + ahead if added else STRIDES[0]
        return _Kept(None if cache is None else weakref.ref(cache), rows, left)

    def _try_reserve(self, tokens: int, rows: int) -> bool:
        try:
            self._reserve(tokens, rows)
        except BudgetError:
            return False
        return True

    def _reserve(self, tokens: int, rows: int) -> None:
        added = self._growth(tokens, rows) if tokens else 0
        here, caches = threading.get_ident(), list(self._caches)
        added += sum(self._growth(*work) for thread, work in list(self._at_work.items()) if thread != here)
        movable = [cache for cache in caches if not _is_paged(cache)]
        for part in self._devices:
            if part.closed:
                continue
            held, moved = sum(_sizes(caches, part.device)), _sizes(movable, part.device)
            # A tensor that grows, or is put in another order, is there twice for a moment.
            twice = max(moved) * (sum(moved) + added) // sum(moved) if any(moved) else 0
            part.make_room(held + added + twice)


def _sizes(caches: Iterable[Any], device: torch.device) -> list[int]:
    """Bytes of each piece of memory behind the tensors of `caches` on `device`."""
    tensors = (reached.tensor for cache in caches for reached in reachable_tensors(cache))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == device)
    return list({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _cache_in(named: dict[str, Any]) -> Any:
    """The cache among arguments or outputs, if it is one that can be watched."""
    found = (named.get(name) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None and hasattr(cache, "__weakref__")), None)


def _is_paged(cache: Any) -> bool:
    """Whether it is the cache of continuous batching: pages that never grow or move."""
    return not hasattr(cache, "get_seq_length")


def _free(cache: Any) -> int:
    """Tokens that every layer of `cache` has taken room for already."""
    return min((getattr(layer, "tokens_free", 0) for layer in getattr(cache, "layers", ())), default=0)


def _added(cache: Any, tokens: int) -> int:
    """Tokens that a forward of `tokens` may add to `cache`: none to pages, all of a static cache that is to come."""
    if cache is None:
        return tokens
    if _is_paged(cache):
        return 0
    layers = getattr(cache, "layers", ())
    static = [layer for layer in layers if getattr(layer, "max_cache_len", 0)]
    awaited = [layer.max_cache_len for layer in static if not layer.is_initialized]
    if layers and len(static) == len(layers) and not awaited:
        return 0
    return max([tokens, *awaited])
