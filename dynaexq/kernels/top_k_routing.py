"""Routing by softmax and the largest probabilities (Shazeer et al., 2017), as routers of Transformers compute it.

It knows no model.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingKind(NamedTuple):
    """What routers differ in: `RoutingKind(True, True)` is that of Qwen3-MoE, `(True, False)` of Mixtral.

    Attributes:
        normalized: whether the weights of a token are divided by their sum.
        rounded: whether they are rounded to the dtype of the logits at the end.
    """

    normalized: bool
    rounded: bool


def top_k_routing(logits: Tensor, top_k: int, kind: RoutingKind) -> tuple[Tensor, Tensor]:
    """The weights `[N, top_k]` and the ids `[N, top_k]` of the experts that `logits [N, experts]` choose."""
    weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    if kind.normalized:
        weights /= weights.sum(dim=-1, keepdim=True)
    return (weights.to(logits.dtype) if kind.rounded else weights), ids
