"""Change a model step by step, and undo every step exactly.

Experts lose their parameters and get a new class (`replace_modules`), then their bytes (`connect`); the model gets a
runtime, a quantizer and guards (`attach`). It decides nothing, and both doors use it: `patch`, and `from_pretrained`.
"""

import gc
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dynaexq.errors import CheckpointError, UnpatchError
from dynaexq.hf import decoder_layer
from dynaexq.hf.compat import install_output_capturing, is_distributed
from dynaexq.hf.decode_attention import attend_as_before, attend_natively
from dynaexq.hf.decoder_layer import FewTokensDecoderLayer, passes_natively
from dynaexq.hf.discovery import SparseLayer, activation_name, activation_of
from dynaexq.hf.distributed import sizes_of
from dynaexq.hf.growing_cache import watch_caches
from dynaexq.hf.packed_dense import untie
from dynaexq.hf.planning import growth_of_cache
from dynaexq.kernels import ExpertLayer
from dynaexq.quantization import ExpertWeights
from dynaexq.runtime.cache_room import CacheRoom
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.door import watch_door
from dynaexq.runtime.experts import MixedPrecisionExperts
from dynaexq.runtime.few_rows import FewRows, forgotten, mixin_for
from dynaexq.runtime.linear import PackedLinear
from dynaexq.runtime.moe import DynaExqMoE
from dynaexq.safeguards.weak_method import WeakMethod
from dynaexq.weights.sources import ExpertSource


def swap_class(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Make `module` an instance of `mixin` as well, in place; `restore_class` undoes it."""
    module.__class__ = _swapped_class(mixin, type(module))  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__class__ = type(module).__bases__[1]


@cache
def _swapped_class(mixin: Any, family: Any) -> Any:
    # The mixin's name stays in front, so that a printed model shows where it was patched.
    name = f"{mixin.__name__}[{family.__name__}]"
    return type(name, (mixin, family), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


RECORD = "_dynaexq_patch"
"""The attribute of a patched model that holds its `ModelPatch`."""


EXACT = ("fp16",)
"""Tiers at which a patched model gives the very bits of the original: nothing that may round otherwise is changed."""


class ModelPatch:
    """The changes made to one model, each with the step that undoes it, on a stack.

    A step is registered before its change is made, and is harmless where that was not reached. So whatever interrupts
    a patch, `restore` leaves the model as it was.

    Args:
        layers: its sparse layers, in order, as found before anything was changed.
        wrapper: what `model` lies in and was handed in by, where that is another module; it shows the runtime as well.
    """

    def __init__(self, model: Any, layers: list[SparseLayer], wrapper: nn.Module | None = None):
        self.layers = layers
        # Both hold this, and must be freed with their last user.
        self._model = weakref.ref(model)
        self._wrapper = weakref.ref(model if wrapper is None else wrapper)
        self.source: ExpertSource | None = None
        self._undo_steps = ExitStack()
        self._guarded: list[weakref.ref[nn.Module]] = []
        self._homes: dict[str, tuple[DeviceRuntime, int]] = {}
        self._linears: dict[str, nn.Module] = {}
        self._untied: dict[str, str] = {}
        self._lost_linears = False
        self._loaded_here = getattr(model, "is_quantized", False) and layers[0].device.type == "meta"

    @property
    def model(self) -> Any:
        """The model that was changed."""
        return self._model()

    def replace_modules(self, placeholders: Mapping[str, Mapping[str, nn.Parameter]] | None = None) -> None:
        """Take the parameters away from all experts and give experts and blocks their new classes.

        Args:
            placeholders: what to leave in the place of the parameters for a while, by layer and name.
        """
        for layer in self.layers:
            self._undo_steps.callback(_restore_modules, layer)
            for name in layer.parameters:
                del layer.experts._parameters[name]
            layer.experts._parameters.update((placeholders or {}).get(layer.name, {}))
            with _detached_hook(layer.experts):
                swap_class(layer.experts, MixedPrecisionExperts)
            if layer.block is not None:
                swap_class(layer.block, DynaExqMoE)

    def drop_placeholders(self) -> None:
        """Take away what `replace_modules` left in the place of the parameters."""
        for layer in self.layers:
            layer.experts._parameters.clear()

    def move_dense(self, device: torch.device) -> None:
        """Move what is not experts to `device`; called while the experts have no parameters and no bytes."""
        original = self.layers[0].device
        if device == original:
            return
        if original.type != "meta":  # else only the experts were there, and the dense weights come from elsewhere
            self._undo_steps.callback(WeakMethod(self.model.to), original)
        self.model.to(device)

    def replace_linears(self, twins: Mapping[str, nn.Module]) -> None:
        """Put quantized twins in the place of dense linear layers."""
        self._linears = {path: self.model.get_submodule(path) for path in twins}
        self._undo_steps.callback(WeakMethod(self._restore_linears))
        for path, twin in twins.items():
            self.model.set_submodule(path, twin)
            shared = untie(self.model, path) if isinstance(twin, PackedLinear) else None
            if shared is not None:
                self._untied[f"{path}.weight"] = shared

    def connect(self, runtime: DeviceRuntime, layers: list[SparseLayer]) -> None:
        """Connect `layers`, in the order of `runtime`, to their bytes."""
        exchanges_tokens = sizes_of(getattr(self.model, "config", None))[1] > 1
        for index, layer in enumerate(layers):
            experts = layer.experts
            post_norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
            base = runtime.stored.base[index]
            constant = ExpertLayer(
                runtime.codec,
                base,
                activation_of(experts),
                post_norm,
                activation_name(experts),
                runtime.settings.activations,
            )
            self._undo_steps.callback(_disconnect, layer)
            ports = replace(runtime.ports(index), exchanges_tokens=exchanges_tokens)
            experts.connect(constant, ports, tuple(layer.parameters))
            self._homes[layer.name] = runtime, index
            if layer.block is not None:
                layer.block._view = runtime.view(index)

    def attach(self, runtime: Any, quantizer: Any, answers: Mapping[str, Callable[..., Any]]) -> None:
        """Give the model its runtime and its quantizer, and keep its experts from being moved or copied.

        Args:
            answers: what takes the place of methods of the model, with this patch before their arguments, by name.
        """
        self._undo_steps.callback(WeakMethod(self._detach), self.model.__dict__.get("hf_quantizer"))
        self._guard_ancestors()
        for name, answer in {**_OWN_ANSWERS, **answers}.items():
            _answer_for_patched(type(self.model), name, answer)
        self.model.hf_quantizer = quantizer
        quantizer.follows_replays = runtime.follows_replays
        for module in self._shown_on():
            module.dynaexq = runtime
            setattr(module, RECORD, self)
        self._undo_steps.callback(watch_door(self.model))
        if runtime.settings.kv_reserve == "auto":
            self._undo_steps.callback(CacheRoom(runtime.devices, growth_of_cache(self.model)).watch(self.model))
        if runtime.plan.tiers != EXACT:
            self._shorten_decoding()
        install_output_capturing(self.model)  # last, because Transformers has no way to take its hooks off

    def _shorten_decoding(self) -> None:
        """Let what few rows pass beside the experts go the short way on a CPU, where there is one."""
        for module in self.model.modules():
            mixin = mixin_for(module)
            if mixin is not None:
                self._undo_steps.callback(_restore_few_rows, module)
                swap_class(module, mixin)
        for module in self.model.modules():
            if passes_natively(module):
                self._undo_steps.callback(_restore_decoder_layer, module)
                swap_class(module, FewTokensDecoderLayer)
        decoder_layer.link(self.model)
        self._undo_steps.callback(attend_as_before, attend_natively(self.model))
        self._undo_steps.callback(watch_caches(self.model))

    def free_originals(self, keep_experts: bool) -> None:
        """Free the original weights: the dense ones that were replaced, the experts unless upgrades come from them."""
        self._lost_linears, self._linears = bool(self._linears), {}
        if not keep_experts:
            for layer in self.layers:
                layer.forget_weights()

    def undo(self) -> None:
        """Back to the original model, experts included.

        Raises:
            UnpatchError: their 16-bit weights cannot be reached; the model stays patched.
        """
        self._check_undoable()
        self._give_back([self._original_parameters(index, layer) for index, layer in enumerate(self.layers)])

    def dequantize(self) -> None:
        """Back to a model of plain modules, whose experts have in 16 bit the values that they are read at now.

        Raises:
            UnpatchError: dense weights were quantized as well, or the model is spread over ranks; it stays patched.
        """
        self._check_undoable()
        self._give_back(
            [_as_parameters(layer, _oriented(layer, layer.experts.dequantized())) for layer in self.layers]
        )

    def _check_undoable(self) -> None:
        if is_distributed(self.model):
            raise UnpatchError(
                "the model is spread over ranks, and was never whole; load it again without a quantization_config"
            )
        if self._lost_linears:
            raise UnpatchError(
                "the dense layers were quantized by patch, and the originals freed; load the model again"
            )

    def _give_back(self, originals: list[dict[str, nn.Parameter]]) -> None:
        """End the patch, with these parameters for the experts of each layer."""
        self.model.dynaexq.close()
        for layer, parameters in zip(self.layers, originals, strict=True):
            layer.parameters.update(parameters)
        self.restore()

    def restore(self) -> None:
        """Take every change back, the last one first, from whatever point was reached."""
        self._undo_steps.close()

    def homes(self) -> list[tuple[SparseLayer, DeviceRuntime, int]]:
        """Every layer in order, with its runtime and its number there."""
        return [(layer, *self._homes[layer.name]) for layer in self.layers]

    def _shown_on(self) -> list[Any]:
        """What shows the runtime, as far as it still lives."""
        return [module for module in (self._wrapper(), self.model) if module is not None]

    def _restore_linears(self) -> None:
        for path, linear in self._linears.items():
            self.model.set_submodule(path, linear)
        if self._untied:
            self.model.all_tied_weights_keys.update(self._untied)

    def _detach(self, quantizer: Any) -> None:
        ours = {id(layer.experts) for layer in self.layers}
        for reference in self._guarded:
            module = reference()
            if module is not None and all(id(experts) in ours for experts in _patched_experts(module)):
                for guard in ("_apply", "__reduce_ex__"):
                    module.__dict__.pop(guard, None)
        if self._loaded_here and hasattr(self.model, "hf_quantizer"):
            self.model.hf_quantizer.remove_quantization_config(self.model)
        for module in self._shown_on():
            for name in ("dynaexq", RECORD):
                module.__dict__.pop(name, None)
        self.model.__dict__.pop("hf_quantizer", None)
        if quantizer is not None:
            self.model.hf_quantizer = quantizer

    def _original_parameters(self, index: int, layer: SparseLayer) -> dict[str, nn.Parameter]:
        if layer.device.type != "meta":
            return dict(layer.parameters)
        runtime, _ = self._homes[layer.name]
        return _as_parameters(layer, self._exact_weights(index, layer).map(partial(_copied_to, runtime.device)))

    def _exact_weights(self, index: int, layer: SparseLayer) -> ExpertWeights:
        """A layer's 16-bit experts as the family stores them, from a tier that keeps them, or from the checkpoint."""
        if self.source is not None:
            try:
                return self.source.read(index, 0, self.source.num_experts)
            except CheckpointError as error:
                raise UnpatchError(f"the original experts cannot be read any more: {error}") from error
        runtime, local = self._homes[layer.name]
        weights = runtime.stored.source(local)
        if weights is None:
            raise UnpatchError(
                f"the 16-bit experts are gone: with tiers={runtime.plan.tiers} they were freed by patch, or their "
                "copy by close; load the model again, or take 'fp16' among the tiers and unpatch first"
            )
        return _oriented(layer, weights)

    def _guard_ancestors(self) -> None:
        """Have all modules that contain experts refuse what those would.

        Before the first dense weight is converted, or copied: a move that is refused half-way leaves two dtypes.
        """
        parts = [layer.name.split(".") for layer in self.layers]
        paths = {".".join(path[:end]) for path in parts for end in range(len(path))}
        ancestors = [self.model.get_submodule(path) for path in paths]
        outermost = self._wrapper() or self.model
        if not isinstance(outermost, PreTrainedModel):
            ancestors += _containers(outermost)
        for module in ancestors:
            self._guarded.append(weakref.ref(module))
            module._apply = partial(_guarded_apply, weakref.ref(module))
            module.__reduce_ex__ = MixedPrecisionExperts.refuse_copy


def _restore_few_rows(module: nn.Module) -> None:
    forgotten(module)
    if isinstance(module, FewRows):
        restore_class(module)


def _restore_decoder_layer(module: nn.Module) -> None:
    decoder_layer.forgotten(module)
    if isinstance(module, FewTokensDecoderLayer):
        restore_class(module)


def _oriented(layer: SparseLayer, weights: ExpertWeights) -> ExpertWeights:
    """Decoded weights as the family stores them."""
    if not getattr(layer.experts, "is_transposed", False):
        return weights
    return replace(weights, up=weights.up.transpose(1, 2), down=weights.down.transpose(1, 2))


def _copied_to(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    return part.to(device, copy=True)


def _as_parameters(layer: SparseLayer, weights: ExpertWeights) -> dict[str, nn.Parameter]:
    parts = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    named = dict(zip(layer.parameter_names, parts, strict=False))
    return {
        name: nn.Parameter(named[name], parameter.requires_grad)  # type: ignore[arg-type]
        for name, parameter in layer.parameters.items()
    }


def _containers(module: nn.Module) -> list[nn.Module]:
    """All modules that contain `module`. A module knows its children only; the garbage collector knows the others."""
    alive = [other for other in gc.get_objects() if issubclass(type(other), nn.Module)]
    found = [module]
    for inner in found:
        found += [
            outer for outer in alive if outer not in found and inner in outer.__dict__.get("_modules", {}).values()
        ]
    return found[1:]


def _patched_experts(module: nn.Module) -> list[MixedPrecisionExperts]:
    return [child for child in module.modules() if isinstance(child, MixedPrecisionExperts)]


def _answer_for_patched(family: Any, name: str, answer: Callable[..., Any]) -> None:
    """Have the method `name` of patched models of a class answered by `answer`, and that of all others as ever.

    The class is told, once, and not the model: a method that the model holds would have to hold the model, which is
    then not freed with its last user.
    """
    original = getattr(family, name, None)
    if original is None or hasattr(original, RECORD):
        return

    @wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        patch = model.__dict__.get(RECORD)
        return original(model, *args, **kwargs) if patch is None else answer(patch, *args, **kwargs)

    setattr(method, RECORD, True)
    setattr(family, name, method)


def by_transformers(patch: ModelPatch, name: str, *args: Any, **kwargs: Any) -> Any:
    """What the method `name` of the model does when it is not patched."""
    return getattr(type(patch.model), name).__wrapped__(patch.model, *args, **kwargs)


def _memory_footprint(patch: ModelPatch, *args: Any, **kwargs: Any) -> int:
    """What Transformers counts, and the experts where they are."""
    memory = patch.model.dynaexq.memory()
    return int(by_transformers(patch, "get_memory_footprint", *args, **kwargs)) + memory["total"] - memory["dense"]


def _num_parameters(patch: ModelPatch, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Weights of the model, packed ones as well; of those none is trained."""
    experts = sum(parameter.numel() for layer in patch.layers for parameter in layer.parameters.values())
    others = by_transformers(patch, "num_parameters", only_trainable, exclude_embeddings)
    return int(others) + (0 if only_trainable else experts)


_OWN_ANSWERS: dict[str, Callable[..., Any]] = {
    "get_memory_footprint": _memory_footprint,
    "num_parameters": _num_parameters,
}


def _restore_modules(layer: SparseLayer) -> None:
    """Give experts and block of a layer their own classes back, and the experts their parameters."""
    if isinstance(layer.block, DynaExqMoE):
        restore_class(layer.block)
    if isinstance(layer.experts, MixedPrecisionExperts):
        with _detached_hook(layer.experts):
            restore_class(layer.experts)
    for name, parameter in layer.parameters.items():
        layer.experts._parameters[name] = parameter


def _disconnect(layer: SparseLayer) -> None:
    layer.experts.disconnect()
    if layer.block is not None:
        layer.block.__dict__.pop("_view", None)


def _guarded_apply(reference: "weakref.ref[Any]", fn: Any, recurse: bool = True) -> nn.Module:
    module: Any = reference()
    for experts in _patched_experts(module):
        experts.refuse_move(fn)
    return type(module)._apply(module, fn, recurse)


class _detached_hook:
    """Remove an accelerate hook from a module while its class changes: the hook wraps the forward it found."""

    def __init__(self, module: nn.Module):
        self.module, self.hook = module, getattr(module, "_hf_hook", None)

    def __enter__(self) -> None:
        if self.hook is not None:
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(self.module)
        self.module.__dict__.pop("forward", None)  # removal leaves the old class's forward behind, bound

    def __exit__(self, *_: object) -> None:
        if self.hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(self.module, self.hook)
