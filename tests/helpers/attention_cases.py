"""Cases of attention of few queries."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Of queries `[batch, heads, queries, width]`, and of keys and values `[batch, groups, keys, ...]`."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    value_width: int


SHAPES = [
    Shape(1, 8, 2, 1, 1, 64, 64),
    Shape(2, 6, 2, 3, 67, 32, 96),
    Shape(1, 12, 1, 1, 259, 128, 32),
    Shape(1, 14, 2, 2, 130, 64, 64),
    Shape(2, 4, 4, 5, 600, 192, 128),
    Shape(1, 32, 4, 1, 1025, 128, 128),
]
"""One key and many, a head of keys for each of queries and for a dozen, rows that no step of the kernel divides."""

MASKS = ["none", "truths", "bfloat16", "float32"]


def tensors(shape: Shape, mask: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and a mask of this kind, of which some rows see no key, and some of a block."""
    torch.manual_seed(shape.keys)
    batch, heads, groups, queries, keys, width, value_width = shape
    query = torch.randn(batch, queries, heads, width).bfloat16().transpose(1, 2)
    key, value = (torch.randn(batch, groups, keys, size).bfloat16() for size in (width, value_width))
    if mask == "none":
        return query, key, value, None
    seen = torch.rand(batch, heads, queries, keys) < 0.7
    seen[..., : keys // 2] &= torch.rand(batch, 1, 1, 1) < 0.5
    seen[0, 0, 0] = False
    if mask == "truths":
        return query, key, value, seen
    added = torch.randn(seen.shape).masked_fill(~seen, -torch.inf)
    return query, key, value, added.to(getattr(torch, mask))
