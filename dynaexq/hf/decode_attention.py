"""Few queries attend natively on a CPU, where Transformers calls the function that it has registered as `sdpa`.

PyTorch's own takes 15 milliseconds per layer for a token of bfloat16 over 4,096 others of a 30B model, this less than
one. The function in its place asks the module that calls, and only those of patched models answer. Whatever PyTorch
has to look at, or computes as fast, is left to the function that was there; the model's configuration stays as it is.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from dynaexq.kernels import decode_attention
from dynaexq.runtime.experts import in_function_transform, must_be_operators

NATIVE = "_dynaexq_attends"
"""Attribute of modules whose few queries attend natively."""


class SdpaOfFew:
    """Stands where `sdpa` of Transformers stood, and has its arguments and its result."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor | None]]):
        self.original = original

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tensors = query, key, value, attention_mask
        if NATIVE in vars(module) and _is_plain(tensors, kwargs):
            native = decode_attention(query.device)
            if native is not None and native.takes(*tensors):
                scale = kwargs.get("scaling")
                return native(*tensors, query.shape[-1] ** -0.5 if scale is None else scale), None
        return self.original(module, *tensors, **kwargs)


def attend_natively(model: nn.Module) -> list[nn.Module]:
    """Let the modules of `model` that attend do so natively for few queries; returns them."""
    registered = AttentionInterface()["sdpa"]
    if not isinstance(registered, SdpaOfFew):
        AttentionInterface.register("sdpa", SdpaOfFew(registered))
    # Every attention module of Transformers says whether it is causal.
    attending = [module for module in model.modules() if "is_causal" in vars(module)]
    for module in attending:
        setattr(module, NATIVE, True)
    return attending


def attend_as_before(modules: Iterable[nn.Module]) -> None:
    """Take back what `attend_natively` did to them."""
    for module in modules:
        vars(module).pop(NATIVE, None)


def _is_plain(tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], kwargs: dict[str, Any]) -> bool:
    """Whether this is the plain formula, and PyTorch need not see its operators."""
    query, key, value, mask = tensors
    if not is_formula(query.shape[2], mask, kwargs) or in_function_transform():
        return False
    return not (must_be_operators(query, key) or must_be_operators(value, value))


def is_formula(queries: int, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether what is asked of `sdpa` is plain attention under `mask`."""
    if mask is None and queries > 1:  # causal or not, as the function that was there finds out
        return False
    if kwargs.get("dropout") or kwargs.get("output_attentions") or kwargs.get("softcap") is not None:
        return False
    return kwargs.get("position_bias") is None
