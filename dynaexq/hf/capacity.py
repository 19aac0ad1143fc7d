"""What `hbm_budget="auto"` means: the device memory there is, less room for the context that was asked for."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from dynaexq.errors import SettingsError
from dynaexq.hf.compat import text_config
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.hf.kv_cache_size import cache_bytes
from dynaexq.hf.meta_model import skeleton_of
from dynaexq.planning.budget import weights_budget
from dynaexq.settings import Settings
from dynaexq.weights.quantize_experts import weight_bytes

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
    """Bytes of cache and activations for `batch` sequences of `tokens` tokens, in a skeleton's own dtype."""
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
    twin = skeleton_of(model)
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
