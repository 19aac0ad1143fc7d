"""Patch a live Transformers model and take the patch back. The only door between a model and the runtime.

A patch is a transaction: everything that can be refused is refused first, then the experts are encoded beside the
model, and only then is the model changed, in steps that are all undone if one of them fails.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynaexq.adoption import adopt, release
from dynaexq.errors import PatchError, SettingsError, UnpatchError
from dynaexq.experts import MixedPrecisionExperts
from dynaexq.formats import ExpertCodec
from dynaexq.hf.activations import activation_name
from dynaexq.hf.capacity import auto_budget
from dynaexq.hf.compat import install_output_capturing
from dynaexq.hf.families import LiveSource, SparseLayer, find_sparse_layers
from dynaexq.hf.quantizer import AttachedQuantizer
from dynaexq.kernels import ExpertLayer
from dynaexq.memory import DeviceMemory
from dynaexq.moe import DynaExqMoE
from dynaexq.placement import check_source, weight_bytes
from dynaexq.policy import LADDERS, plan_memory
from dynaexq.records import MemoryPlan
from dynaexq.runtime import Runtime
from dynaexq.settings import Settings


@torch.inference_mode(False)  # what is allocated here outlives the caller's inference mode
def patch(model: nn.Module, hbm_budget: int | str = "auto", **dials: Any) -> Runtime:
    """Put the experts of `model` under a byte budget, in place; `model.generate()` and all else work as before.

    Every expert is quantised to the base tier and stays on the device; the hottest hold an upgrade besides, within
    `hbm_budget`, and which ones those are follows the traffic. The original expert weights are freed.

    Args:
        model: a Transformers model with the standard experts interface, on the CPU or on the device.
        hbm_budget: ceiling on the device bytes of all weights: `"20GiB"`, `"20GB"`, bytes, or `"auto"`.
        **dials: the other fields of `dynaexq.Settings`: `tiers`, `device`, `policy`, `half_life`, ...

    Returns:
        The runtime, also `model.dynaexq`.

    Raises:
        SettingsError: a dial has a value it cannot take.
        BudgetError: nothing fits; the message names the least that does.
        UnsupportedModelError, PatchError: the model, or the state it is in; the message names the module.
        QuantizationError: an expert holds NaN, infinity, or a weight beyond 32768.

    After any error the model is as it was.
    """
    settings = Settings.from_dials({"hbm_budget": hbm_budget, **dials})
    layers = find_sparse_layers(model)
    device = _resolve_device(settings)
    source = LiveSource(layers)
    codecs = _codecs(layers[0], settings)
    plan = _plan(model, layers, codecs, settings, device)
    codec = codecs[plan.tiers]
    if codec.planes:
        check_source(source)
    runtime = Runtime(model, plan, codec, settings, device)
    runtime.load(source)
    record = _Patch(model, layers, runtime)
    record.commit(codec, device)
    return runtime


@torch.inference_mode(False)
def unpatch(model: nn.Module) -> None:
    """Undo `patch` exactly, while the 16-bit experts can still be reached: where `fp16` is one of the tiers.

    Raises:
        PatchError: the model is not patched.
        UnpatchError: the original weights are gone; the model stays patched and works on.
    """
    record = model.__dict__.get("_dynaexq_patch")
    if record is None:
        raise PatchError("the model is not patched; there is nothing to undo")
    record.undo()


@dataclass
class _Patch:
    """What was changed in a model, and how to change it back."""

    model: Any
    layers: list[SparseLayer]
    runtime: Runtime
    parameters: list[dict[str, nn.Parameter]] = field(default_factory=list)

    def commit(self, codec: ExpertCodec, device: torch.device) -> None:
        self.original_device = self.layers[0].weights().up.device
        self.quantizer = getattr(self.model, "hf_quantizer", None)
        self.parameters = [_expert_parameters(layer.experts) for layer in self.layers]
        self.trainable = [{name: p.requires_grad for name, p in named.items()} for named in self.parameters]
        try:
            for index, layer in enumerate(self.layers):
                self._take_over(index, layer, codec)
            if device != self.original_device:
                self.model.to(device)
            self._guard_ancestors()
            self.model.dynaexq = self.runtime
            self.model.hf_quantizer = AttachedQuantizer(self.quantizer)
            self.model._dynaexq_patch = self
            install_output_capturing(self.model)  # last, because Transformers has no way to take its hooks off
        except BaseException:
            self._restore(self.parameters)
            raise
        if not self.runtime.keeps_source:
            self.parameters = []

    def undo(self) -> None:
        parameters = self.parameters or self._rebuild()
        self.runtime.close()
        self._restore(parameters)

    def _take_over(self, index: int, layer: SparseLayer, codec: ExpertCodec) -> None:
        experts = layer.experts
        activation = experts._apply_gate if experts.has_gate else experts.act_fn
        post_norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        for name in self.parameters[index]:
            del experts._parameters[name]
        with _detached_hook(experts):
            adopt(experts, MixedPrecisionExperts)
        base = self.runtime.base_blocks(index)
        constant = ExpertLayer(codec, base, activation, post_norm, activation_name(experts))
        experts.connect(constant, self.runtime.ports(index))
        if layer.block is not None:
            adopt(layer.block, DynaExqMoE)
            layer.block._view = self.runtime.view(index)

    def _restore(self, parameters: list[dict[str, nn.Parameter]]) -> None:
        """Back to the state before `commit`, from whatever point it had reached."""
        for layer, originals in zip(self.layers, parameters, strict=True):
            experts, block = layer.experts, layer.block
            if isinstance(block, DynaExqMoE):
                block.__dict__.pop("_view", None)
                release(block)
            if isinstance(experts, MixedPrecisionExperts):
                experts.disconnect()
                with _detached_hook(experts):
                    release(experts)
            for name, parameter in originals.items():
                experts._parameters[name] = parameter
        for name in self._ancestors():
            for guard in ("_apply", "__reduce_ex__"):
                self.model.get_submodule(name).__dict__.pop(guard, None)
        for name in ("dynaexq", "_dynaexq_patch", "hf_quantizer"):
            self.model.__dict__.pop(name, None)
        if self.quantizer is not None:
            self.model.hf_quantizer = self.quantizer
        self.model.to(self.original_device)

    def _rebuild(self) -> list[dict[str, nn.Parameter]]:
        rebuilt = []
        for index, layer in enumerate(self.layers):
            weights = self.runtime.source_weights(index)
            if weights is None:
                raise UnpatchError(
                    f"the 16-bit experts are gone: with tiers={self.runtime.plan.tiers} they were freed by patch, "
                    "or their copy by close; load the model again, or take 'fp16' among the tiers and unpatch first"
                )
            flip = getattr(layer.experts, "is_transposed", False)
            up, down = (w.transpose(1, 2) if flip else w for w in (weights.up, weights.down))
            named: dict[str, Any] = {layer.up_name: up, "down_proj": down}
            named |= {f"{layer.up_name}_bias": weights.up_bias, "down_proj_bias": weights.down_bias}
            rebuilt.append(
                {name: nn.Parameter(named[name].clone(), trains) for name, trains in self.trainable[index].items()}
            )
        return rebuilt

    def _ancestors(self) -> set[str]:
        """Paths of all modules that contain experts, the model itself (an empty path) among them."""
        parts = [layer.name.split(".") for layer in self.layers]
        return {".".join(path[:end]) for path in parts for end in range(len(path))}

    def _guard_ancestors(self) -> None:
        # What the experts refuse must be refused before the first dense weight is converted, or copied.
        for name in self._ancestors():
            module = self.model.get_submodule(name)
            module._apply = partial(_guarded_apply, module)
            module.__reduce_ex__ = partial(MixedPrecisionExperts.__reduce_ex__, module)


def _guarded_apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    for child in module.modules():
        if isinstance(child, MixedPrecisionExperts):
            child.refuse_move(fn)
    return type(module)._apply(module, fn, recurse)


class _detached_hook:
    """Take an accelerate hook off a module while its class changes: the hook wraps the forward it found."""

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


def _expert_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in experts._parameters.items() if p is not None}


def _resolve_device(settings: Settings) -> torch.device:
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}') from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}: no kernels for it')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f'device {name!r} was asked for, but this PyTorch finds no CUDA device; use device="cpu"')
    if settings.host_copy == "pinned" and device.type != "cuda":
        raise SettingsError('host_copy="pinned" serves a CUDA device; on a CPU use host_copy="ram" or "disk"')
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _codecs(layer: SparseLayer, settings: Settings) -> dict[tuple[str, ...], ExpertCodec]:
    """A codec for every ladder that is offered, or asked for."""
    dtype = layer.weights().up.dtype
    return {
        tiers: ExpertCodec(layer.shape(), dtype, tiers, settings.group_size, settings.quantizer)
        for tiers in {*LADDERS, *_ladders(settings)}
    }


def _ladders(settings: Settings) -> tuple[tuple[str, ...], ...]:
    """The ladders to choose from: the user's, or all that are offered."""
    return LADDERS if isinstance(settings.tiers, str) else (settings.tiers,)


def _plan(
    model: nn.Module,
    layers: list[SparseLayer],
    codecs: dict[tuple[str, ...], ExpertCodec],
    settings: Settings,
    device: torch.device,
) -> MemoryPlan:
    num_layers, num_experts = len(layers), len(layers[0].weights().up)
    chosen = _ladders(settings)
    budget = settings.hbm_budget
    if isinstance(budget, str):
        in_memory = settings.host_copy != "disk"
        host_bytes = in_memory * max(codecs[t].upgrade_layout.nbytes for t in chosen) * num_layers * num_experts
        budget = auto_budget(model, settings, device, host_bytes)
    return plan_memory(
        [(codecs[tiers].base, codecs[tiers].upgrade) for tiers in chosen],
        num_layers,
        num_experts,
        dense=_dense_bytes(model, layers),
        workspace=DeviceMemory.workspace_bytes(num_layers, num_experts),
        budget=budget,
        alternatives=[(codecs[tiers].base, codecs[tiers].upgrade) for tiers in LADDERS],
    )


def _dense_bytes(model: nn.Module, layers: list[SparseLayer]) -> int:
    """Bytes of all weights and buffers but the experts' own."""
    experts = {id(p) for layer in layers for p in layer.experts._parameters.values()}
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return weight_bytes(t for t in tensors if id(t) not in experts)
