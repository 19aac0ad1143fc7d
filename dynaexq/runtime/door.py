"""Which positions of a batch are padding: seen at the model's door, asked for in every layer of experts.

A padded position is routed as any other, and says nothing about the traffic. What a forward is given as a mask
`[batch, length]` is known to its layers for as long as it runs, on its thread.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_IS_TOKEN: ContextVar[Tensor | None] = ContextVar("_IS_TOKEN", default=None)


def watch_padding(model: nn.Module) -> Callable[[], None]:
    """Look at the mask of every forward of `model`; what is returned ends that."""
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
    is_token = _IS_TOKEN.get()
    return is_token.to(rows.device) if is_token is not None and len(is_token) == len(rows) else None


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _IS_TOKEN.set(_is_token(args, kwargs))


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        _IS_TOKEN.set(None)


def _is_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of the rows that this forward computes; the mask's first columns may be of what is cached."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = next((value for value in given if isinstance(value, Tensor)), None)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if inputs is None or inputs.ndim < 2 or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    batch, length = inputs.shape[:2]
    if length == 1 or len(mask) != batch or mask.shape[1] < length:  # what is decoded is a token
        return None
    rows: Tensor = mask[:, -length:].reshape(-1) != 0
    # On a GPU a look at the mask would wait for it.
    return None if rows.is_cpu and bool(rows.all()) else rows
