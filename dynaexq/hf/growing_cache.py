"""A KV cache that grows without being copied for every token: its layers get room at their end, on a CPU.

Transformers copies all keys and values of a layer for each token that joins them: at 4,096 tokens of a 30B model half
a millisecond per layer, as long as attention takes. Here a layer that has grown twice in a row is copied once into
memory with room for more tokens, which then join in place. Who holds the keys of an earlier step still sees them as
they were, as nothing is written but behind what was ever given out; what others have put in their place, cropped, put
in another order, or copied, is copied again before it grows in place. It counts no budget.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from dynaexq.runtime.cache_room import tokens_ahead
from dynaexq.runtime.door import CACHE_NAMES
from dynaexq.runtime.experts import must_be_operators

NAMES = ("keys", "values")


class RoomyLayer(DynamicLayer):
    """Takes the place of a layer of keys and values that grow; copies and pickles are plain again."""

    _given: dict[str, "weakref.ref[Tensor]"]
    """The keys and the values given out last. While they are the layer's, the memory behind them is its own."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, `[batch, heads, tokens, width]`, with these at their end."""
        if not self._grows_in_place(key_states, value_states):
            self._given = {}
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._joined("keys", key_states)
        self.values = self._joined("values", value_states)
        return self.keys, self.values

    def extended(self, joining: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values with room for so many more tokens at their end, for the caller to write.

        None where they do not grow in place, or `update` has to make room first.
        """
        if not self._grows_in_place(self.keys, self.values):
            return None
        longer = {}
        for name in NAMES:
            old = self._own(name)
            end = 0 if old is None else old.shape[-2] + joining
            if old is None or end > _capacity(old):
                return None
            longer[name] = _longer(old, end)
        self.keys, self.values = longer["keys"], longer["values"]
        self._given = {name: weakref.ref(tensor) for name, tensor in longer.items()}
        return self.keys, self.values

    @property
    def tokens_free(self) -> int:
        """Tokens that there is room for."""
        return min(
            (_capacity(old) - old.shape[-2] for name in NAMES if (old := self._own(name)) is not None), default=0
        )

    def _grows_in_place(self, *joining: Tensor) -> bool:
        if not self.is_initialized or self.keys is None or self.keys.ndim != 4 or not self.keys.is_cpu:
            return False
        if any(must_be_operators(old, new) for old, new in zip((self.keys, self.values), joining, strict=True)):
            return False
        return self.keys.is_inference() == torch.is_inference_mode_enabled()

    def _own(self, name: str) -> Tensor | None:
        """Keys or values, unless others have changed them since they were given out."""
        given = self._given.get(name)
        tensor = None if given is None else given()
        return tensor if tensor is getattr(self, name) else None

    def _joined(self, name: str, joining: Tensor) -> Tensor:
        old, end = self._own(name), getattr(self, name).shape[-2] + joining.shape[-2]
        if old is None or not _are_alike(old, joining):  # others may change it every time
            joined = torch.cat([getattr(self, name), joining], dim=-2)
        else:
            joined = _longer(old if end <= _capacity(old) else _with_room(old, end + tokens_ahead()), end)
            joined.narrow(-2, old.shape[-2], joining.shape[-2]).copy_(joining)
        self._given[name] = weakref.ref(joined)
        return joined

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (DynamicLayer,), {name: value for name, value in vars(self).items() if name != "_given"}


def watch_caches(model: nn.Module) -> Callable[[], None]:
    """Give room to the caches that forwards of `model` are handed; what is returned ends that."""
    return model.register_forward_pre_hook(_enter, with_kwargs=True).remove


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    for name in CACHE_NAMES:
        for layer in getattr(kwargs.get(name), "layers", ()):
            if type(layer) is DynamicLayer:
                layer.__class__, layer._given = RoomyLayer, {}


def _are_alike(old: Tensor, joining: Tensor) -> bool:
    """Whether the two differ in their tokens alone; `torch.cat` knows what is to become of others."""
    if old.dtype != joining.dtype or old.device != joining.device or old.ndim != joining.ndim:
        return False
    return old.shape[:-2] == joining.shape[:-2] and old.shape[-1] == joining.shape[-1]


def _capacity(tensor: Tensor) -> int:
    """Tokens of the memory `[batch, heads, tokens, width]` that `tensor` is the beginning of."""
    return tensor.stride(-3) // tensor.stride(-2)


def _longer(tensor: Tensor, tokens: int) -> Tensor:
    """So many tokens of the memory that `tensor` is the beginning of."""
    return tensor.as_strided((*tensor.shape[:-2], tokens, tensor.shape[-1]), tensor.stride(), tensor.storage_offset())


def _with_room(old: Tensor, tokens: int) -> Tensor:
    """`old [batch, heads, tokens, width]` in memory for so many tokens."""
    memory = old.new_empty(*old.shape[:-2], tokens, old.shape[-1])
    beginning = memory[..., : old.shape[-2], :]
    beginning.copy_(old)
    return beginning
