"""Attention of one new token on a CPU, where several query heads share keys and values: nothing is repeated.

The query heads of a group are as good as the tokens of one sequence: they meet the same keys. So one call of PyTorch's
own attention takes them as such, where its grouped path repeats keys and values first, which takes ten times as long
at 4,096 tokens. Everything else is left to Transformers. It knows no cache and no model.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"
NAME = "dynaexq_sdpa"
"""What configurations call it, in memory only: it is never saved."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As Transformers' `sdpa_attention_forward`, for query `[B, heads, T, D]`, key and value `[B, groups, S, D]`."""
    if not _is_one_token_of_groups(query, key, attention_mask, kwargs):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    batch, heads, _, size = query.shape
    rows = query.reshape(batch, key.shape[1], -1, size)  # [B, groups, heads per group, D]
    output = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, value.shape[-1]), None


def _is_one_token_of_groups(query: Tensor, key: Tensor, mask: Tensor | None, others: dict[str, Any]) -> bool:
    is_grouped = query.shape[2] == 1 and key.shape[1] < query.shape[1] and query.shape[0] == key.shape[0]
    # A mask of its own for each head does not fit the groups.
    is_shared = mask is None or (mask.ndim == 4 and mask.shape[1] == 1)
    is_plain = others.get("position_bias") is None and others.get("softcap") is None
    return is_grouped and is_shared and is_plain and query.device.type == "cpu"


def use_grouped_attention(model: nn.Module) -> Callable[[], None]:
    """Have all parts of `model` that use PyTorch's attention use this; what is returned ends that."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[SDPA])
    undo = ExitStack()
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "_attn_implementation", None) == SDPA:
            config._attn_implementation = {"": NAME}  # and not of the configurations in it
            undo.callback(setattr, config, "_attn_implementation", {"": SDPA})
    return undo.close
