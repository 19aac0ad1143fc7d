"""Attention of a few new tokens over all that there are: the formula, and what computes it. It knows no model."""

from typing import Protocol

import torch
from torch import Tensor


class DecodeAttention(Protocol):
    """Computes `attention` of few queries, over keys and values where they lie."""

    def takes(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether it computes this, and faster than PyTorch."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """`attention` of tensors that it takes, within one rounding of each output."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) in float32, over heads of keys that queries share in groups.

    Args:
        query: `[batch, heads, queries, width]`.
        key: `[batch, groups, keys, width]`, of which as many heads of queries use each as `heads / groups`.
        value: `[batch, groups, keys, value width]`.
        mask: broadcasts to `[batch, heads, queries, keys]`: true where a key is seen, or what is added to its score.
        scale: of the scores.

    Returns:
        `[batch, queries, heads, value width]` in the dtype of the query; zeros for a query that sees no key.
    """
    heads_a_group = query.shape[1] // key.shape[1]
    keys, values = (tensor.float().repeat_interleave(heads_a_group, 1) for tensor in (key, value))
    scores = scale * query.float() @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ values).transpose(1, 2).to(query.dtype)
