"""The one planner: `inspect_model` says what planning must know of a model, `plan` how its budget is spent.

`patch`, `from_pretrained`, `quantize` and `dynaexq plan` all go through these two, so they agree by construction. No
weight is read and no codec is made.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynaexq.errors import BudgetError, SettingsError
from dynaexq.hf.dense import bytes_saved
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.free_memory import free_bytes
from dynaexq.hf.kv_cache_size import Context, cache_growth, context_bytes
from dynaexq.hf.meta_model import meta_twin
from dynaexq.kernels import arrangement_on
from dynaexq.memory import DeviceMemory
from dynaexq.memory.tensor_bytes import weight_bytes
from dynaexq.planning.budget import (
    DENSE_LOSS,
    TIER_CHOICES,
    ModelSpec,
    least_loss,
    loss_of,
    plan_memory,
    plan_within,
    tier_choices,
    weights_budget,
)
from dynaexq.quantization import ROW_BY_ROW, ExpertCodec, offered, tier_sizes
from dynaexq.settings import Settings
from dynaexq.types import MemoryPlan

logger = logging.getLogger(__name__)

Tiers = tuple[str, ...]


def inspect_model(
    model: Any,
    layers: Sequence[SparseLayer],
    settings: Settings,
    *,
    stored: Tiers | None = None,
    dense: int | None = None,
    num_experts: int | None = None,
    context: Context | None = None,
) -> ModelSpec:
    """Collect what planning must know of `model`, on the meta device or not.

    Args:
        layers: its sparse layers, or those on one device.
        stored: the tiers of a packed checkpoint that the experts come from.
        dense: bytes of what is not experts; counted in `model`, as `settings.dense` will hold it, if left out.
        num_experts: per layer; fewer than there are where ranks share them out.
        context: what the context takes, where that is known; else it is found out if `settings` need it.

    Raises:
        SettingsError: the tiers that were asked for are not among those that `stored` planes allow.
    """
    first = layers[0]
    shape, num_experts = first.shape(), num_experts or first.num_experts
    sized = partial(tier_sizes, shape, first.dtype, settings.group_size, settings.scale_bits)
    context = context_for(model, settings) if context is None else context
    return ModelSpec(
        name=type(model).__name__,
        dtype=str(first.dtype).removeprefix("torch."),
        num_layers=len(layers),
        num_experts=num_experts,
        experts=sum(parameter.nbytes for layer in layers for parameter in layer.parameters.values()),
        num_weights=len(layers) * num_experts * shape.num_weights,
        dense=dense_bytes(model, layers) - bytes_saved(model, layers, settings) if dense is None else dense,
        workspace=DeviceMemory.workspace_bytes(len(layers), num_experts),
        choices=sized(_choices(settings, stored)),
        offered=sized(offered(stored) if stored else TIER_CHOICES),
        quantizer=settings.quantizer,
        cache=context.cache,
        activations=context.activations,
        packed=stored is not None,
    )


def plan(spec: ModelSpec, settings: Settings, device: torch.device, held: int = 0) -> MemoryPlan:
    """Decide how `settings.hbm_budget` is spent on `device`: which tiers, how many upgrade slots.

    Tiers are chosen for what is left beside all of `kv_reserve`; where that is `"auto"`, the slots are as many as fit
    before the first context.

    Args:
        held: bytes of the model on `device`, which count as free for `hbm_budget="auto"`.

    Raises:
        BudgetError: nothing fits.
        SettingsError: `hbm_budget="auto"`, and the context alone does not fit.
    """
    reserve = 0 if settings.kv_reserve is None else spec.cache
    found = _plan_of_weights(spec, settings, device, held, reserve)
    if settings.kv_reserve == "auto":
        return found.filled(found.budget + reserve)
    return replace(found, budget=found.budget + reserve)


def _plan_of_weights(spec: ModelSpec, settings: Settings, device: torch.device, held: int, reserve: int) -> MemoryPlan:
    """The plan of what is left beside `reserve` bytes for the cache."""
    if not isinstance(settings.hbm_budget, str):
        try:
            return plan_memory(spec, settings.hbm_budget - reserve)
        except BudgetError as error:
            if not reserve:
                raise
            least = error.least + reserve
            raise BudgetError(
                f"hbm_budget of {settings.hbm_budget:,} bytes is too small: beside the {reserve:,} that "
                f"kv_reserve={settings.kv_reserve!r} keeps for the KV cache, weights need {error.least:,}; raise "
                f"hbm_budget to at least {least}, lower kv_reserve, or max_context and max_batch",
                settings.hbm_budget,
                least,
            ) from error
    available = held + free_bytes(device)
    left = weights_budget(available, spec.context)
    if left <= 0:
        raise SettingsError(
            f'hbm_budget="auto" found {available:,} bytes on {device} and max_context={settings.max_context}, '
            f"max_batch={settings.max_batch} need {available - left:,} of them; lower these or give hbm_budget "
            "yourself"
        )
    return plan_within(spec, available, device.type == "cpu" and spec.waits_in_ram(settings.host_copy))


def with_dense_chosen(
    settings: Settings,
    model: Any,
    layers: Sequence[SparseLayer],
    device: torch.device,
    *,
    held: int = 0,
    stored: Tiers | None = None,
) -> Settings:
    """`settings`, with a format in the place of `dense="auto"`: that with the least predicted loss, which is logged.

    Arguments are those of `inspect_model` and `plan`.

    Raises:
        BudgetError: nothing fits, however dense layers are packed.
    """
    if settings.dense != "auto":
        return settings

    def planned(trial: Settings) -> MemoryPlan:
        return plan(inspect_model(model, layers, trial, stored=stored), trial, device, held)

    trials: dict[str | None, Settings] = {dense: replace(settings, dense=dense) for dense in DENSE_LOSS}
    plans = {}
    for dense, trial in trials.items():
        with suppress(BudgetError):
            plans[dense] = planned(trial)
    if not plans:
        plans[dense] = planned(trial)  # the last packs the most, and says what is missing
    chosen = least_loss(plans)
    found = plans[chosen]
    logger.info(
        'dense="auto" takes %s: %s of dense weights, %.0f %% of the experts upgraded',
        chosen or "16 bit", f"{found.dense:,} bytes", 100 * found.share_upgraded,
    )  # fmt: skip
    return trials[chosen]


def plan_together(
    specs: Mapping[torch.device, ModelSpec], settings: Settings, held: Mapping[torch.device, int]
) -> dict[torch.device, MemoryPlan]:
    """Plan for every device that a model's layers lie on, at the same tiers: those with the least loss.

    Raises as `plan` does, where no tiers fit on every device.
    """
    plans = {device: plan(spec, settings, device, held[device]) for device, spec in specs.items()}
    if len({found.tiers for found in plans.values()}) == 1:
        return plans
    candidates = []
    for number in range(len(next(iter(specs.values())).choices)):
        alone = {device: replace(spec, choices=(spec.choices[number],)) for device, spec in specs.items()}
        with suppress(BudgetError):
            candidates.append({device: plan(spec, settings, device, held[device]) for device, spec in alone.items()})
    if not candidates:  # each device has tiers that fit, and no two the same
        least = max(spec.weights(base) for spec in specs.values() for base, _ in spec.choices[:1])
        raise BudgetError(
            f"hbm_budget is too small for the same tiers on all of {', '.join(map(str, specs))}; raise it to at least "
            f"{least}, or give tiers",
            min(found.budget for found in plans.values()),
            least,
        )
    return min(candidates, key=lambda found: sum(loss_of(part) * part.num_layers for part in found.values()))


def context_for(model: Any, settings: Settings) -> Context:
    """What the context takes, where `settings` ask for a budget that leaves room for it; else nothing.

    Nothing is known of the cache of a model that is not one of Transformers'.

    Raises:
        SettingsError: `kv_reserve="auto"`, and the model is not one of Transformers'.
    """
    fixed = settings.kv_reserve if isinstance(settings.kv_reserve, int) else None
    if settings.hbm_budget != "auto" and settings.kv_reserve != "auto":
        return Context(fixed or 0, 0)
    if not isinstance(model, PreTrainedModel):
        if settings.kv_reserve == "auto":
            raise SettingsError(
                f'kv_reserve="auto" needs a model of Transformers, whose cache is known, got {type(model).__name__}; '
                "give kv_reserve a size"
            )
        return Context(fixed or 0, 0)
    twin = _on_meta(model)
    found = context_bytes(twin, find_sparse_layers(twin, on_meta=True), settings.max_context, settings.max_batch)
    return found if fixed is None else found._replace(cache=fixed)


def growth_of_cache(model: PreTrainedModel) -> Callable[[int, int], int]:
    """A function that gives the bytes of the cache of a context, by its tokens and its sequences."""
    twin = _on_meta(model)
    of_one = cache_growth(twin, find_sparse_layers(twin, on_meta=True), 1)
    return lambda tokens, batch: batch * of_one(tokens)


def _on_meta(model: PreTrainedModel) -> PreTrainedModel:
    return model if next(model.parameters()).is_meta else meta_twin(model)


WITHOUT_KERNELS = ("mps", "xpu")
"""Devices that are slow for want of kernels, and work."""


def resolve_device(settings: Settings) -> torch.device:
    """The device that `settings` name, or a GPU with kernels, if one is here, or the CPU. Raises SettingsError."""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}') from error
    if device.type not in ("cpu", "cuda", *WITHOUT_KERNELS):
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}: no kernels for it')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f'device {name!r} was asked for, but this PyTorch finds no CUDA device; use device="cpu"')
    if device.type in WITHOUT_KERNELS and not _is_here(device):
        raise SettingsError(f'device {name!r} was asked for, but this PyTorch finds none; use device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()}, numbered from 0"
        )
    if settings.host_copy == "pinned" and device.type != "cuda":
        raise SettingsError('host_copy="pinned" serves a CUDA device; elsewhere use host_copy="ram" or "disk"')
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _is_here(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def _choices(settings: Settings, stored: Tiers | None) -> tuple[Tiers, ...]:
    """The tiers to choose from: those that were asked for, all that there are, or what a packed checkpoint holds.

    Raises:
        SettingsError: the tiers that were asked for are not among those that the `stored` planes allow.
    """
    if stored is None:
        return tier_choices(settings.tiers)
    if isinstance(settings.tiers, str):
        return (stored,)
    if settings.tiers not in offered(stored):
        allowed = ", ".join(map(str, offered(stored)))
        raise SettingsError(
            f"tiers={settings.tiers} cannot be read from a checkpoint packed as {stored}; it allows {allowed}; choose "
            "one of them, or quantize the 16-bit source again"
        )
    return (settings.tiers,)


def make_codec(
    layer: SparseLayer,
    tiers: Tiers,
    settings: Settings,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> ExpertCodec:
    """The codec of the experts of `layer` at `tiers`.

    Args:
        dtype: of 16-bit parts, instead of the layer's own.
        device: where they are to be multiplied; None for files.
    """
    dtype = dtype or layer.dtype
    arrangement = ROW_BY_ROW if device is None else arrangement_on(device, dtype)
    options = settings.group_size, settings.quantizer, settings.scale_bits
    return ExpertCodec(layer.shape(), dtype, tiers, *options, arrangement)


def dense_bytes(model: nn.Module, layers: Iterable[SparseLayer], device: torch.device | None = None) -> int:
    """Bytes of all weights and buffers but the experts' own; with `device`, of those that lie there."""
    experts = {id(p) for layer in layers for p in layer.experts._parameters.values()}
    tied = getattr(model, "all_tied_weights_keys", {})  # on the meta device they are not tied yet
    tensors: list[Tensor] = [t for name, t in model.named_parameters() if not (t.is_meta and name in tied)]
    tensors += model.buffers()
    return weight_bytes(t for t in tensors if id(t) not in experts and device in (None, t.device))


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of the model's weights and buffers on `device`."""
    return weight_bytes(t for t in [*model.parameters(), *model.buffers()] if t.device == device)
