"""What a model is given, seen at its door and asked for in its layers of experts: padding, and requests that begin.

A padded position is routed as any other, and says nothing about the traffic. A request begins with a prompt: several
positions of each row, before anything was cached for them. What a forward is given is known to its layers while it
runs, on its thread; nothing is known where PyTorch compiles the whole forward, prompts included.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynaexq.policy.kinds import Arrival

CACHE_NAMES = ("past_key_values", "cache")
"""What a forward calls its cache, by version of Transformers."""


@dataclass(frozen=True, eq=False)
class _Given:
    """What one forward is given.

    Attributes:
        is_token: bool `[batch * length]`, which positions are no padding; None where all are, or it is not known.
        begins: whether requests begin.
        ids: `[batch, length]`, or None for embeddings.
        positions: `[1, N]`, of each token in its own sequence, where the tokens of many requests come as one row.
        num_positions: padding included.
    """

    is_token: Tensor | None = None
    begins: bool = False
    ids: Tensor | None = None
    positions: Tensor | None = None
    num_positions: int = 0


_NOTHING = _Given()
_GIVEN: ContextVar[_Given] = ContextVar("_GIVEN", default=_NOTHING)


def watch_door(model: nn.Module) -> Callable[[], None]:
    """Look at what every forward of `model` is given; what is returned ends that."""
    handles = (
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, always_call=True),
    )

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def tokens_among(rows: Tensor) -> Tensor | None:
    """Which of a layer's `rows [N, H]` are tokens and no padding, bool `[N]` on their device.

    None where all are, or where it is not known.
    """
    is_token = _GIVEN.get().is_token
    return is_token.to(rows.device) if is_token is not None and len(is_token) == len(rows) else None


def arrival() -> Arrival | None:
    """The requests that begin with the forward at work, if any do. Waits for a GPU that the words lie on."""
    given = _GIVEN.get()
    if not given.begins:
        return None
    if given.ids is None:
        return Arrival.unknown(given.num_positions)
    if given.positions is not None:
        return _arrival_among_others(given.ids, given.positions)
    ids = given.ids.cpu()
    is_token = torch.ones_like(ids, dtype=torch.bool) if given.is_token is None else given.is_token.cpu().view_as(ids)
    return Arrival.of([row[mask].numpy() for row, mask in zip(ids, is_token, strict=True)])


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _GIVEN.set(_given(args, kwargs))


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        _GIVEN.set(_NOTHING)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given:
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = next((value for value in given if isinstance(value, Tensor)), None)
    if inputs is None or inputs.ndim < 2 or inputs.shape[1] == 1:  # what is decoded is a token, and begins nothing
        return _NOTHING
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    ids = inputs if inputs.ndim == 2 and not inputs.is_floating_point() else None
    batch, length = inputs.shape[:2]
    positions = _positions_in_pages(kwargs)
    if positions is not None:
        return _Given(begins=bool((positions == 0).any()), ids=ids, positions=positions, num_positions=length)
    return _Given(_is_token(mask, batch, length), _is_empty(kwargs), ids, None, batch * length)


def _is_token(mask: Any, batch: int, length: int) -> Tensor | None:
    """The mask of the rows that a forward computes; the mask's first columns may be of what is cached."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != batch or mask.shape[1] < length:
        return None
    rows: Tensor = mask[:, -length:].reshape(-1) != 0
    # On a GPU a look at the mask would wait for it.
    return None if rows.is_cpu and bool(rows.all()) else rows


def _is_empty(kwargs: dict[str, Any]) -> bool:
    """Whether nothing is cached for what is given. Of a cache of pages on a GPU nothing is told."""
    found = (kwargs.get(name) for name in CACHE_NAMES)
    lengths = [getattr(cache, "get_seq_length", None) for cache in found if cache is not None]
    return all(length is not None and int(length()) == 0 for length in lengths)


def _positions_in_pages(kwargs: dict[str, Any]) -> Tensor | None:
    """The positions of tokens of many requests, as continuous batching gives them; None where a look would wait."""
    cache, positions = kwargs.get("cache"), kwargs.get("position_ids")
    in_pages = cache is not None and not hasattr(cache, "get_seq_length")
    return positions if in_pages and isinstance(positions, Tensor) and positions.is_cpu else None


def _arrival_among_others(ids: Tensor, positions: Tensor) -> Arrival | None:
    """The requests that begin in a row of many: their sequences begin at position 0."""
    flat = positions.flatten()
    starts = torch.cat([torch.tensor([0]), 1 + torch.nonzero(flat[1:] != flat[:-1] + 1).flatten()]).tolist()
    pieces = zip(starts, [*starts[1:], len(flat)], strict=True)
    prompts = [ids.flatten()[a:b].numpy() for a, b in pieces if flat[a] == 0 and b - a > 1]
    return Arrival.of(prompts, len(starts) - len(prompts)) if prompts else None
