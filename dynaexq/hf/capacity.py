"""What `hbm_budget="auto"` means: the device memory there is, less room for the context that was asked for."""

from typing import Any

import psutil
import torch
from torch import nn

from dynaexq.errors import SettingsError
from dynaexq.hf.compat import text_config
from dynaexq.settings import Settings

RESERVED_SHARE = 0.1  # of the memory at hand, for allocator rounding and everybody else
ACTIVATION_COPIES = 16  # hidden-sized buffers alive at once in a decoder layer, counted for the whole context


def auto_budget(model: nn.Module, settings: Settings, device: torch.device, host_bytes: int) -> int:
    """Bytes that the weights may take on `device`, with the model's own bytes there counted as free.

    Args:
        host_bytes: host memory that the upgrades will take; on a CPU it comes out of the same memory.

    Raises:
        SettingsError: the context alone does not fit.
    """
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if t.device == device)
    available = held + _free_bytes(device) - (host_bytes if device.type == "cpu" else 0)
    element_size = getattr(model, "dtype", torch.float16).itemsize  # the cache is kept in the model's own dtype
    context = context_bytes(text_config(model), settings.max_context, settings.max_batch, element_size)
    reserve = int(RESERVED_SHARE * available) + context
    if available <= reserve:
        raise SettingsError(
            f'hbm_budget="auto" found {available:,} bytes on {device} and max_context={settings.max_context}, '
            f"max_batch={settings.max_batch} need {reserve:,} of them; lower these or give hbm_budget yourself"
        )
    return available - reserve


def context_bytes(config: Any, max_context: int, max_batch: int, element_size: int) -> int:
    """Bytes of cache and activations for `max_batch` sequences of `max_context` tokens; 0 without a config."""
    if config is None or not hasattr(config, "num_hidden_layers"):
        return 0
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * kv_heads * head_dim
    return (cache + ACTIVATION_COPIES * config.hidden_size) * max_context * max_batch * element_size


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)
