"""Patch a live Transformers model and take the patch back.

A patch is a transaction: everything that can be refused is refused first, then the experts are encoded beside the
model, and only then is the model changed, in steps that are all undone if one of them fails.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaexq.errors import PatchError, UnsupportedModelError
from dynaexq.hf.answers import ANSWERS
from dynaexq.hf.calibration import calibration_for
from dynaexq.hf.checkpoint_source import CheckpointSource
from dynaexq.hf.config import DynaExqConfig, as_config
from dynaexq.hf.dense import dense_quantizer, quantized_linears
from dynaexq.hf.discovery import LiveSource, SparseLayer, find_sparse_layers, transformers_model
from dynaexq.hf.meta_model import read_config
from dynaexq.hf.model_patch import RECORD, ModelPatch
from dynaexq.hf.planning import held_bytes, inspect_model, make_codec, resolve_device, with_dense_chosen
from dynaexq.hf.planning import plan as make_plan
from dynaexq.hf.quantized_source import open_checkpoint
from dynaexq.hf.quantizer import DynaExqQuantizer
from dynaexq.hf.warm_up import warm_up
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.runtime import Runtime
from dynaexq.weights.quantize_experts import QuantizingLoader
from dynaexq.weights.sources import ExpertSource


@torch.inference_mode(False)  # what is allocated here outlives the caller's inference mode
def patch(
    model: nn.Module,
    hbm_budget: int | str | None = None,
    *,
    tiers: str | tuple[str, ...] | None = None,
    device: str | None = None,
    dense: str | None = None,
    policy: str | Callable[..., Any] | None = None,
    host_copy: str | None = None,
    calibration: str | PathLike[str] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    config: DynaExqConfig | Mapping[str, Any] | None = None,
) -> Runtime:
    """Put the experts of `model` under a byte budget, in place; `model.generate()` and all else work as before.

    Every expert is quantized to the base tier and stays on the device; the hottest hold an upgrade besides, within
    `hbm_budget`, and which ones those are follows the traffic. The original expert weights are freed.

    Examples:
        >>> runtime = dynaexq.patch(model, hbm_budget="20GiB", tiers=("int4", "int8"))           # doctest: +SKIP
        >>> runtime = dynaexq.patch(model, "20GiB", config=DynaExqConfig(half_life=256))         # doctest: +SKIP

    Args:
        model: a Transformers model with the standard experts interface, on the CPU or on the device. Of a module that
            such a model lies in (a wrapper of your own, or PEFT's) that model is patched, counted and saved.
        hbm_budget: ceiling on the device bytes of all weights: `"20GiB"`, `"20GB"`, bytes, or `"auto"`.
        tiers: the precisions of an expert, the base first, such as `("int4", "int8")`. This and what follows are
            options of `DynaExqConfig`, which has the details.
        device: where the model computes, such as `"cuda:1"`.
        dense: what dense linear layers are packed as, such as `"int8"`.
        policy: who deserves precision: `"topn"`, `"threshold"`, `"frozen"`, or a function.
        host_copy: where upgrades wait, such as `"disk"`.
        calibration: the path of what `dynaexq.calibrate` wrote.
        checkpoint: the directory of the 16-bit safetensors to read the experts from, where the model's own are on
            the meta device.
        config: every other option, also as a dict. An argument that is not None wins over it.

    Returns:
        The runtime, also `model.dynaexq`.

    Raises:
        SettingsError: an option has a value it cannot take.
        BudgetError: nothing fits; the message names the least that does.
        UnsupportedModelError, PatchError: the model, or the state it is in; the message names the module.
        CheckpointError: the checkpoint is incomplete, damaged, or of another model.
        QuantizationError: an expert holds NaN, infinity, or a weight beyond 32768.

    After any error the model is as it was.
    """
    config = as_config(config).updated(
        hbm_budget=hbm_budget,
        tiers=tiers,
        device=device,
        dense=dense,
        policy=policy,
        host_copy=host_copy,
        calibration=calibration,
    )
    settings = config.settings()
    wrapper, layers = model, find_sparse_layers(model, on_meta=checkpoint is not None)
    model, layers = transformers_model(model, layers)
    target = resolve_device(settings)
    source = LiveSource(layers) if checkpoint is None else _source_in(Path(checkpoint), model, layers)
    held = held_bytes(model, target)
    settings = with_dense_chosen(settings, model, layers, target, held=held)
    known = calibration_for(settings, layers)
    twins = quantized_linears(model, layers, settings, target, known) if settings.dense else {}
    plan = make_plan(inspect_model(model, layers, settings), settings, target, held)
    codec = make_codec(layers[0], plan.tiers, settings, device=target)
    loaded = DeviceRuntime(model, plan, codec, settings, target, QuantizingLoader(source, known))
    return _commit(ModelPatch(model, layers, wrapper), loaded, source, twins, config)


@torch.inference_mode(False)
def unpatch(model: nn.Module) -> None:
    """Undo `patch` exactly, while the 16-bit experts can still be reached: where `fp16` is one of the tiers, or they
    came from a checkpoint that is still there.

    Raises:
        PatchError: the model is not patched.
        UnpatchError: the original weights are gone; the model stays patched and works on.
    """
    changes = model.__dict__.get(RECORD)
    if changes is None:
        raise PatchError("the model is not patched; there is nothing to undo")
    changes.undo()


def _source_in(directory: Path, model: nn.Module, layers: Sequence[SparseLayer]) -> ExpertSource:
    on_meta = [name for name, tensor in model.named_parameters() if tensor.is_meta and not _is_of(name, layers)]
    if on_meta:
        raise UnsupportedModelError(
            f"{on_meta[0]} is on the meta device, and patch reads experts only; load the dense weights first, or load "
            "the whole model with from_pretrained(..., quantization_config=dynaexq.DynaExqConfig(...))"
        )
    config = read_config(directory) if (directory / "config.json").is_file() else model.config
    return CheckpointSource(model, layers, open_checkpoint(directory, config))


def _is_of(name: str, layers: Sequence[SparseLayer]) -> bool:
    return any(name.startswith(f"{layer.name}.") for layer in layers)


def _commit(
    changes: ModelPatch,
    loaded: DeviceRuntime,
    source: ExpertSource,
    twins: dict[str, nn.Module],
    config: DynaExqConfig,
) -> Runtime:
    """Change the model; whatever fails, everything is put back."""
    model, layers = changes.model, changes.layers
    runtime = Runtime(model, [(loaded, range(len(layers)))])
    try:
        changes.replace_modules()
        changes.move_dense(loaded.device)
        changes.connect(loaded, layers)
        changes.replace_linears(twins)
        warm_up(model)
        wrapped = getattr(model, "hf_quantizer", None)
        if loaded.settings.dense is not None:
            wrapped = dense_quantizer(loaded.settings, layers[0].dtype, pre_quantized=False)
        changes.attach(runtime, DynaExqQuantizer(config, wrapped=wrapped), ANSWERS)
    except BaseException:
        runtime.close()
        changes.restore()
        raise
    if isinstance(source, CheckpointSource):
        changes.source = source
    changes.free_originals(keep_experts=loaded.stored.keeps_source)
    return runtime
