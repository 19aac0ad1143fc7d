"""Bytes that a context takes beside the weights: the KV cache, found by trial, and activations, estimated.

What is kept per token differs by family: keys and values of few heads or many, a latent, an index beside it, a window,
or a state that never grows. The model's own code knows, and on the meta device two short forwards cost little. Only
the dynamic cache that `generate` makes by default is known here.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from dynaexq.hf.compat import returned_cache, text_config
from dynaexq.hf.discovery import SparseLayer
from dynaexq.memory.tensor_bytes import Reached, attributes, reachable_tensors

TRIAL_LENGTHS = (128, 256)
"""Tokens of the two trials: whole chunks for the families that compress their cache by the chunk."""

ACTIVATION_COPIES = 16
"""Hidden-sized buffers alive at once in a decoder layer, counted for the whole context."""

GROWS_NO_CACHE = ("linear_attention", "conv", "mamba", "moe", "mlp")
"""What `layer_types` of a configuration calls a layer without keys and values."""

logger = logging.getLogger(__name__)

Way = tuple[Any, ...]


class Context(NamedTuple):
    """Bytes that a context takes beside the weights."""

    cache: int
    activations: int


def context_bytes(model: Any, layers: Sequence[SparseLayer], tokens: int, batch: int) -> Context:
    """Bytes of cache and activations for `batch` sequences of `tokens` tokens, in the dtype of a model on meta."""
    config, element_size = text_config(model), model.dtype.itemsize
    cache = cache_growth(model, layers, batch)(tokens)
    return Context(cache, ACTIVATION_COPIES * config.hidden_size * tokens * batch * element_size)


def cache_growth(model: Any, layers: Sequence[SparseLayer], batch: int) -> Callable[[int], int]:
    """Bytes of the cache of `batch` sequences by their tokens; where no trial succeeds, keys and values in full."""
    try:
        cache_bytes(model, layers, 1, batch)
    except Exception as error:  # a model's own code may raise anything where it finds no data
        logger.warning(
            "%s shows no cache without data (%s); taking keys and values in full", type(model).__name__, error
        )
        per_token = _cache_by_config(text_config(model)) * batch * model.dtype.itemsize
        return lambda tokens: per_token * tokens
    return partial(cache_bytes, model, layers, batch=batch)


class _Kept(NamedTuple):
    """One tensor of a cache: its bytes, and after how many tokens it stops growing."""

    nbytes: int
    limit: float


_TRIALS: WeakKeyDictionary[Any, dict[int, list[dict[Way, _Kept]]]] = WeakKeyDictionary()
"""Of each model, by batch: a search for a fit asks again and again, and a trial of 48 layers takes a second."""


def cache_bytes(model: Any, layers: Sequence[SparseLayer], tokens: int, batch: int) -> int:
    """Bytes that `batch` sequences of `tokens` tokens leave in the cache.

    What grows is taken to grow by the same bytes per token, up to its window.

    Args:
        model: on the meta device; as it was, afterwards.
        layers: its sparse layers.

    Raises:
        Exception: whatever the model's own code raises that cannot do without data.
    """
    trials = _TRIALS.setdefault(model, {})
    if batch not in trials:
        with _experts_passed_by(layers), torch.no_grad():
            trials[batch] = [_trial(model, length, batch) for length in TRIAL_LENGTHS]
    short, long = trials[batch]
    return sum(_extrapolated(short[way], long[way], tokens) for way in long)


def _trial(model: Any, tokens: int, batch: int) -> dict[Way, _Kept]:
    ids = torch.ones(batch, tokens, dtype=torch.long, device="meta")
    cache = returned_cache(model(input_ids=ids, use_cache=True))
    return {reached.way: _kept(reached) for reached in reachable_tensors(cache)}


def _extrapolated(short: _Kept, long: _Kept, context: int) -> int:
    if short.nbytes == long.nbytes:
        return long.nbytes
    first, second, tokens = (int(min(n, long.limit)) for n in (*TRIAL_LENGTHS, context))
    return short.nbytes + (long.nbytes - short.nbytes) * (tokens - first) // (second - first)


def _kept(reached: Reached) -> _Kept:
    """What is kept of one tensor: keys and values of a window stop growing where the innermost one is full."""
    windows = [attributes(owner).get("sliding_window") for owner in reached.owners if not isinstance(owner, dict)]
    limits = [window - 1 for window in windows if isinstance(window, int)]  # the newest sees itself and those kept
    grows_for = limits[-1] if limits and reached.way[-1] in ("keys", "values") else float("inf")
    return _Kept(reached.tensor.nbytes, grows_for)


def _cache_by_config(config: Any) -> int:
    """Elements per token, keys and values in every layer that has any: an upper bound for those that compress."""
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 2 * kv_heads * head_dim * sum(kind not in GROWS_NO_CACHE for kind in kinds)


@contextmanager
def _experts_passed_by(layers: Sequence[SparseLayer]) -> Iterator[None]:
    """Make experts return their inputs: routing depends on data that does not exist on the meta device."""
    for layer in layers:
        layer.experts.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.experts.forward
