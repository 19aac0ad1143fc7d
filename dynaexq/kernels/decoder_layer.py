"""What few tokens pass in a decoder layer: its parts, and what computes them in two calls, or many layers in one.

Before attention: norm, queries, keys and values, norms of their heads, rotation. After it: the linear layer behind
attention, residual, norm, router, choice, experts, residual. Attention in between is the model's, or that of few
queries over a cache that has room. It knows no model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dynaexq.kernels.expert_layer import ExpertLayer
from dynaexq.kernels.linear_layer import DenseProduct, LinearLayer
from dynaexq.kernels.row_norm import RowNorm
from dynaexq.kernels.top_k_routing import RoutingKind

Matrix = LinearLayer | DenseProduct


class DecoderParts(NamedTuple):
    """The parts of one decoder layer, where and as they are now.

    Attributes:
        norm: of what comes in.
        query_norm: of each head of queries, or None.
        key_norm: of each head of keys, or None.
        width: of a head.
        block_norm: of what goes to the router and the experts.
    """

    norm: RowNorm
    query: Matrix
    key: Matrix
    value: Matrix
    query_norm: RowNorm | None
    key_norm: RowNorm | None
    width: int
    out: Matrix
    block_norm: RowNorm
    router: DenseProduct
    routing: RoutingKind
    top_k: int
    experts: ExpertLayer


class Step(NamedTuple):
    """What a whole layer is given.

    Attributes:
        output: like `hidden_states`, to be written.
        cosine: `[1 or batch, length, width]`, as is `sine`.
        key: `[batch, groups, keys, width]`, of which the last `length` are to be written; and so is `value`.
        mask: as in `decode_attention.attention`.
    """

    hidden_states: Tensor
    output: Tensor
    cosine: Tensor
    sine: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float


class DecoderLayer(Protocol):
    """Computes them for a few rows of bfloat16, each step rounded as Transformers rounds it.

    Attributes:
        most_rows: up to which it is faster than step by step.
    """

    most_rows: int

    def before_attention(self, hidden_states: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[batch, heads, length, width]` of rows `[batch, length, H]`, which lie in a row.

        Args:
            cosine: `[1 or batch, length, width]`, as is `sine`.
        """

    def after_attention(
        self, attended: Tensor, hidden_states: Tensor, entries: Tensor, counts: Tensor | None
    ) -> Tensor:
        """The output `[batch, length, H]` of what was attended to and of the rows that came in.

        Args:
            attended: `[batch, length, heads, width]`.
            entries: as in `Upgrades`.
            counts: as in `dispatch.expert_mlp`.
        """

    def attends(self, hidden_states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether attention of these rows, over keys and values and their own, may be computed with the rest."""

    def step(self, given: Step) -> Any:
        """The whole layer, for `run` of this layer or another; holds what it was given."""

    def run(self, steps: Sequence[Any], published: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compute the steps of many layers, of which each begins with the output of the one before.

        Args:
            published: entries and counts of each, as for `after_attention`.
        """


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads `[..., width]` rotated by the angles of their positions (Su et al., 2021), column k with k + width / 2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine
