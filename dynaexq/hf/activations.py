"""The name of the function between an expert's matrices, where it is one that a kernel may compute itself."""

from typing import Any

from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations import moe

_ALIASES = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
    "relu": ("relu",),
    "relu2": ("relu2",),
}
"""Our names, and those under which Transformers has the same function."""


def activation_name(experts: Any) -> str | None:
    """What `experts` compute between their matrices, as `kernels.ExpertLayer.activation_name`; None if in doubt.

    Told by the class of `act_fn` and by the gate being the very function that Transformers gives to every family
    without one of its own.
    """
    if experts.has_gate and not _has_default_gate(experts):
        return None
    if experts.act_fn in (functional.silu, functional.relu):
        return str(experts.act_fn.__name__)
    return _NAME_OF.get(type(experts.act_fn))


def _has_default_gate(experts: Any) -> bool:
    default = getattr(moe, "_default_apply_gate", None)
    its_own = getattr(experts._apply_gate, "__func__", None)
    return default is not None and its_own is default and getattr(experts, "is_concatenated", True)


_NAME_OF: dict[type[nn.Module], str] = {
    type(ACT2FN[alias]): name for name, aliases in _ALIASES.items() for alias in aliases if alias in ACT2FN
}
