"""Find a model's experts by the standard interface of Transformers, and say clearly what does not fit.

Every class under `@use_experts_implementation` carries the same flags, parameters and call signature, so no family is
named here: a module with `has_gate` and `down_proj` is a layer of experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer

from dynaexq.errors import PatchError, UnsupportedModelError
from dynaexq.hf.compat import is_distributed, text_config
from dynaexq.quantization import ExpertWeights
from dynaexq.runtime.experts import MixedPrecisionExperts
from dynaexq.safeguards.weak_method import WeakMethod
from dynaexq.types import ExpertShape

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class SparseLayer:
    """One layer of experts as found in a model.

    Attributes:
        name: path of the experts module.
        block: the module that holds them, or None where that is a whole decoder layer.
        parameter_names: of the first matrix, the second, and their biases where there are any.
        parameters: the experts' own parameters `[E, ...]` by name, possibly on the meta device.
    """

    name: str
    experts: Any
    block: Any
    parameters: dict[str, nn.Parameter]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        up = "gate_up_proj" if self.experts.has_gate else "up_proj"
        biases = (f"{up}_bias", "down_proj_bias") if getattr(self.experts, "has_bias", False) else ()
        return (up, "down_proj", *biases)

    @property
    def num_experts(self) -> int:
        return len(self.parameters["down_proj"])

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters["down_proj"].dtype

    @property
    def device(self) -> torch.device:
        return self.parameters["down_proj"].device

    def weights(self) -> ExpertWeights:
        """All the layer's experts `[E, ...]`, as the family stores them."""
        return ExpertWeights(*(self.parameters[name] for name in self.parameter_names))

    def shape(self) -> ExpertShape:
        weights = self.weights()
        transposed = bool(getattr(self.experts, "is_transposed", False))
        rows, hidden = weights.up.shape[1:] if not transposed else weights.up.shape[:0:-1]
        intermediate = weights.down.shape[1 if transposed else 2]
        return ExpertShape(hidden, intermediate, rows, weights.up_bias is not None, transposed)

    def forget_weights(self) -> None:
        """Free the bytes of the parameters, and keep their shapes and dtypes."""
        for name, parameter in self.parameters.items():
            self.parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


class LiveSource:
    """The experts of a model in memory; see `sources.ExpertSource`."""

    def __init__(self, layers: list[SparseLayer]):
        self._names = [layer.name for layer in layers]
        self._weights = [layer.weights() for layer in layers]
        self.num_layers = len(layers)
        self.num_experts = layers[0].num_experts
        self.is_lasting = layers[0].device.type == "cpu"
        self.host_nbytes = sum(p.nbytes for layer in layers for p in layer.parameters.values()) * self.is_lasting

    def name(self, layer: int) -> str:
        return self._names[layer]

    def read(self, layer: int, first: int, last: int) -> ExpertWeights:
        return self._weights[layer].map(lambda part: part.detach()[first:last])


def find_sparse_layers(model: nn.Module, on_meta: bool = False) -> list[SparseLayer]:
    """The sparse layers of `model` in order, checked.

    Args:
        on_meta: whether the experts are expected to have shapes only, as their weights will come from a checkpoint.

    Raises:
        PatchError: the model is patched or compiled already.
        UnsupportedModelError: no sparse layer, or one that cannot be taken over; the message names it.
    """
    _check_model(model)
    layers = []
    for name, module in model.named_modules():
        if name and _is_experts(module):
            parent = model.get_submodule(name.rpartition(".")[0])
            block = None if isinstance(parent, GradientCheckpointingLayer) else parent
            parameters = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
            layers.append(SparseLayer(name, module, block, parameters))
    if not layers:
        raise UnsupportedModelError(_no_layers_message(model))
    for layer in layers:
        _check_layer(layer, on_meta)
    _check_uniform(layers)
    return layers


def transformers_model(module: nn.Module, layers: list[SparseLayer]) -> tuple[nn.Module, list[SparseLayer]]:
    """The outermost Transformers model in `module` that has all the layers, and the layers as it names them.

    `module` itself where there is none.
    """
    for path, model in module.named_modules():  # from outside to inside
        prefix = f"{path}." if path else ""
        if isinstance(model, PreTrainedModel) and all(layer.name.startswith(prefix) for layer in layers):
            return model, [replace(layer, name=layer.name.removeprefix(prefix)) for layer in layers]
    return module, layers


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "down_proj")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module such as a Transformers model, got {type(model).__name__}"
        )
    if isinstance(model, DataParallel | DistributedDataParallel) or type(model).__name__ == "FullyShardedDataParallel":
        raise UnsupportedModelError(f"{type(model).__name__} wraps the model; patch model.module before wrapping it")
    if is_distributed(model):
        raise UnsupportedModelError(
            "the model is spread over ranks already; pass quantization_config=dynaexq.DynaExqConfig(...) to "
            "from_pretrained beside distributed_config instead"
        )
    for name, module in model.named_modules():
        if isinstance(module, MixedPrecisionExperts):
            raise PatchError(f"{name} is patched already; use model.dynaexq, or dynaexq.unpatch(model) first")
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise PatchError(
                f"{name or 'the model'} is compiled already; patch first and call torch.compile afterwards"
            )


def _no_layers_message(model: nn.Module) -> str:
    other = sorted({type(m).__name__ for m in model.modules() if "expert" in type(m).__name__.lower()})
    counted = getattr(text_config(model), "num_experts", None)
    if other:
        found = f"found {', '.join(other)}, which do not follow it; experts of this kind are not supported"
    elif counted:
        found = (
            f"found none, though its configuration counts {counted} experts; experts of this kind are not supported"
        )
    else:
        found = "found none; dense models need no dynaexq"
    return (
        f"expected sparse layers with the experts interface of Transformers (has_gate, down_proj) in "
        f"{type(model).__name__}, {found}"
    )


def _check_layer(layer: SparseLayer, on_meta: bool) -> None:
    experts, name = layer.experts, layer.name
    if name.endswith(".base_layer") or hasattr(experts, "base_layer"):
        raise UnsupportedModelError(
            f"{name} is wrapped by an adapter (LoRA); merge or unload it, patch, then add adapters"
        )
    if hasattr(experts, "parametrizations"):
        raise UnsupportedModelError(f"{name} is parametrized; remove the parametrizations before patching")
    forward = getattr(experts, "_old_forward", experts.forward)  # what an accelerate hook wraps
    if getattr(forward, "__func__", None) is not type(experts).forward:
        raise UnsupportedModelError(
            f"{name} has a forward of its own (expert or tensor parallel, or another patch); undo that before patching"
        )
    expected, found = sorted(layer.parameter_names), sorted(layer.parameters)
    if found != expected:
        raise UnsupportedModelError(f"{name}: expected parameters {expected}, found {found}")
    for key in found:
        _check_parameter(f"{name}.{key}", layer.parameters[key], on_meta)
    kinds = {(p.dtype, p.device): f"{key} in {p.dtype} on {p.device}" for key, p in sorted(layer.parameters.items())}
    if len(kinds) > 1:
        raise UnsupportedModelError(f"{name}: expected one dtype on one device, found {' and '.join(kinds.values())}")


def _check_parameter(name: str, parameter: torch.Tensor, on_meta: bool) -> None:
    if type(parameter) not in (nn.Parameter, torch.Tensor):
        raise UnsupportedModelError(
            f"{name} is a {type(parameter).__name__}, expected a plain Parameter; "
            "load the experts unquantized and unsharded"
        )
    if parameter.is_meta and not on_meta:
        raise UnsupportedModelError(
            f"{name} is on the meta device; load the weights first, or say where they are with checkpoint=..."
        )
    if on_meta and not parameter.is_meta:
        raise UnsupportedModelError(
            f"{name} is loaded already, on {parameter.device}; leave out checkpoint=..., or load it on the meta device"
        )
    if parameter.dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(f"{name} is {parameter.dtype}, expected float16, bfloat16 or float32 weights")
    if parameter.ndim not in (2, 3) or not parameter.numel():
        raise UnsupportedModelError(
            f"{name} has shape {tuple(parameter.shape)}, expected [num_experts, ...] and not empty"
        )


def _check_uniform(layers: list[SparseLayer]) -> None:
    """One slab serves all layers, so all must have experts of one shape, number, dtype and device."""
    first = layers[0]
    for layer in layers:
        for what, ours, theirs in zip(
            ("shape", "number of experts", "dtype", "device"), _traits(layer), _traits(first), strict=True
        ):
            if ours != theirs:
                raise UnsupportedModelError(
                    f"expected experts of one {what} in all layers, found {theirs} in {first.name} and {ours} in "
                    f"{layer.name}; patch the sub-models one by one"
                )


def _traits(layer: SparseLayer) -> tuple[ExpertShape, int, torch.dtype, torch.device]:
    return layer.shape(), layer.num_experts, layer.dtype, layer.device


_ALIASES = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
    "relu": ("relu",),
    "relu2": ("relu2",),
}
"""Our names, and those under which Transformers has the same function."""


def activation_of(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an expert does between its matrices, `[n, up_rows] -> [n, intermediate_size]`; does not keep it alive."""
    return WeakMethod(experts._apply_gate) if experts.has_gate else experts.act_fn


def activation_name(experts: Any) -> str | None:
    """Name the activation of `experts`, as `kernels.ExpertLayer.activation_name`; None if in doubt.

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
