"""From settings and a model to a device, codecs for the ladders in question, and a memory plan; touching nothing."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynaexq.errors import SettingsError
from dynaexq.hf.compat import text_config
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.kv_cache_size import cache_bytes
from dynaexq.hf.meta_model import meta_twin
from dynaexq.memory import DeviceMemory
from dynaexq.memory.tensor_bytes import weight_bytes
from dynaexq.planning.budget import TIER_CHOICES, plan_memory, weights_budget
from dynaexq.quantization import ExpertCodec, offered
from dynaexq.settings import Settings
from dynaexq.types import MemoryPlan

Ladder = tuple[str, ...]


def resolve_device(settings: Settings) -> torch.device:
    """The device that `settings` names, or the accelerator if there is one, else the CPU; a SettingsError if none."""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}') from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f'device must be "cpu" or "cuda[:index]", got {name!r}: no kernels for it')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f'device {name!r} was asked for, but this PyTorch finds no CUDA device; use device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()}, numbered from 0"
        )
    if settings.host_copy == "pinned" and device.type != "cuda":
        raise SettingsError('host_copy="pinned" serves a CUDA device; on a CPU use host_copy="ram" or "disk"')
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def tier_choices(settings: Settings, stored: Ladder | None = None) -> tuple[Ladder, ...]:
    """The ladders to choose from: the user's, all that there are, or what a packed checkpoint holds.

    Raises:
        SettingsError: the user's ladder is not among those that the `stored` planes allow.
    """
    if stored is None:
        return TIER_CHOICES if isinstance(settings.tiers, str) else (settings.tiers,)
    if isinstance(settings.tiers, str):
        return (stored,)
    if settings.tiers not in offered(stored):
        allowed = ", ".join(map(str, offered(stored)))
        raise SettingsError(
            f"tiers={settings.tiers} cannot be read from a checkpoint packed as {stored}; it allows {allowed}; choose "
            "one of them, or quantise the 16-bit source again"
        )
    return (settings.tiers,)


def make_codec(layer: SparseLayer, tiers: Ladder, settings: Settings) -> ExpertCodec:
    """The codec of one ladder for the experts of `layer`."""
    return ExpertCodec(layer.shape(), layer.dtype, tiers, settings.group_size, settings.quantizer)


def make_codecs(layer: SparseLayer, ladders: Iterable[Ladder], settings: Settings) -> dict[Ladder, ExpertCodec]:
    """The codec of each of several ladders."""
    return {tiers: make_codec(layer, tiers, settings) for tiers in ladders}


def make_plan(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    codecs: dict[Ladder, ExpertCodec],
    settings: Settings,
    device: torch.device,
    dense: int,
    num_experts: int,
) -> MemoryPlan:
    """How `hbm_budget` is spent on `device`, on the best of the ladders in `codecs`.

    Args:
        dense: bytes there of all weights that are not experts.
        num_experts: experts of a layer on this device.

    Raises:
        BudgetError: nothing fits.
    """
    budget = settings.hbm_budget
    if isinstance(budget, str):
        in_memory = settings.host_copy in ("ram", "pinned", "auto")
        largest = max(codec.upgrade_layout.nbytes for codec in codecs.values())
        budget = auto_budget(model, settings, device, in_memory * largest * len(layers) * num_experts)
    others = {tiers: make_codec(layers[0], tiers, settings) for tiers in TIER_CHOICES}
    return plan_memory(
        [(codec.base, codec.upgrade) for codec in codecs.values()],
        len(layers),
        num_experts,
        dense=dense,
        workspace=DeviceMemory.workspace_bytes(len(layers), num_experts),
        budget=budget,
        alternatives=[(codec.base, codec.upgrade) for codec in others.values()],
    )


def dense_bytes(model: nn.Module, layers: Iterable[SparseLayer], device: torch.device | None = None) -> int:
    """Bytes of all weights and buffers but the experts' own; with `device`, of those that lie there."""
    experts = {id(p) for layer in layers for p in layer.experts._parameters.values()}
    tied = getattr(model, "all_tied_weights_keys", {})  # on the meta device they are not tied yet
    tensors: list[Tensor] = [t for name, t in model.named_parameters() if not (t.is_meta and name in tied)]
    tensors += model.buffers()
    return weight_bytes(t for t in tensors if id(t) not in experts and device in (None, t.device))


logger = logging.getLogger(__name__)


ACTIVATION_COPIES = 16  # hidden-sized buffers alive at once in a decoder layer, counted for the whole context


GROWS_NO_CACHE = ("linear_attention", "conv", "mamba", "moe", "mlp")
"""What `layer_types` of a configuration calls a layer without keys and values."""


class Context(NamedTuple):
    """Bytes that a context takes beside the weights."""

    cache: int
    activations: int


def auto_budget(model: nn.Module, settings: Settings, device: torch.device, host_bytes: int) -> int:
    """Bytes that the weights may take on `device`, with the model's own bytes there counted as free.

    Args:
        host_bytes: host memory that the upgrades will take; on a CPU it comes out of the same memory.

    Raises:
        SettingsError: the context alone does not fit.
    """
    held = weight_bytes(t for t in [*model.parameters(), *model.buffers()] if t.device == device)
    available = held + _free_bytes(device) - (host_bytes if device.type == "cpu" else 0)
    needed = sum(_context_of(model, settings))
    budget = weights_budget(available, needed)
    if budget <= 0:
        raise SettingsError(
            f'hbm_budget="auto" found {available:,} bytes on {device} and max_context={settings.max_context}, '
            f"max_batch={settings.max_batch} need {available - budget:,} of them; lower these or give hbm_budget "
            "yourself"
        )
    return budget


def context_bytes(model: Any, layers: Sequence[SparseLayer], tokens: int, batch: int) -> Context:
    """Bytes of cache and activations for `batch` sequences of `tokens` tokens, in a meta_model's own dtype."""
    config, element_size = text_config(model), model.dtype.itemsize
    try:
        cache = cache_bytes(model, layers, tokens, batch)
    except Exception as error:  # a model's own code may raise anything where it finds no data
        logger.warning(
            "%s shows no cache without data (%s); taking keys and values in full", type(model).__name__, error
        )
        cache = _cache_by_config(config) * tokens * batch * element_size
    return Context(cache, ACTIVATION_COPIES * config.hidden_size * tokens * batch * element_size)


def _context_of(model: nn.Module, settings: Settings) -> Context:
    """The context of a live model; nothing where it is none of Transformers', and nobody knows what it keeps."""
    if not isinstance(model, PreTrainedModel):
        return Context(0, 0)
    twin = meta_twin(model)
    layers = find_sparse_layers(twin, on_meta=True)
    return context_bytes(twin, layers, settings.max_context, settings.max_batch)


def _cache_by_config(config: Any) -> int:
    """Elements a token, keys and values in every layer that has any: more than a family with a trick of its own."""
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 2 * kv_heads * head_dim * sum(kind not in GROWS_NO_CACHE for kind in kinds)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)
