"""What few tokens pass in a decoder layer besides attention: its parts, and what computes them in two calls.

Before attention: norm, queries, keys and values, norms of their heads, rotation. After it: the linear layer behind
attention, residual, norm, router, choice, experts, residual. It knows no model.
"""

from typing import NamedTuple, Protocol

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


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads `[..., width]` rotated by the angles of their positions (Su et al., 2021), column k with k + width / 2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine
