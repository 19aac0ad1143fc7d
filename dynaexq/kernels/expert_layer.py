"""What a kernel needs to know of one layer. It is filled in by the layer's module and read by every kernel."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaexq.errors import InputError
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.types import split_entry

INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
"""What ids of experts may be."""


@dataclass(frozen=True)
class Upgrades:
    """The published upgrades of one layer at one moment, so that both matrices of an expert are read through the same.

    Four experts of which the second is refined to 8 bits have `entries` of [0, 0x7F0000001200 | 8, 0, 0].

    Attributes:
        entries: int64 `[num_experts]` on the layer's device, `address | kind`; kind 0 where there is only the base.
        bytes_at: address -> uint8 `[upgrade.nbytes]`, for kernels that cannot follow an address themselves.
    """

    entries: Tensor
    bytes_at: Callable[[int], Tensor]

    def of(self, expert: int) -> Tensor | None:
        """Bytes of the upgrade of `expert`, or None. Waits for the device."""
        address, kind = split_entry(int(self.entries[expert]))
        return self.bytes_at(address) if kind else None


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The constant part of one layer of experts.

    Attributes:
        codec: what the bytes mean.
        base: uint8 `[num_experts, codec.base.nbytes]`, every expert's base block.
        activation: between the matrices, `[n, up_rows] -> [n, intermediate_size]`; the gate where there is one.
        post_norm: applied to an expert's output before its routing weight, or None.
        activation_name: `silu`, `gelu`, `gelu_tanh`, `relu` or `relu2` where `activation` is exactly that, of the
            first half of the rows times the second where there is a gate; else None. Kernels may fuse it.
        activations: what rows may be rounded to where they meet codes; see `settings.Options`.
        prepared: what kernels keep for this layer. It may lead back to the layer; a table outside would keep it alive.
    """

    codec: ExpertCodec
    base: Tensor
    activation: Callable[[Tensor], Tensor]
    post_norm: Callable[[Tensor], Tensor] | None = None
    activation_name: str | None = None
    activations: str = "auto"
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_experts(self) -> int:
        return len(self.base)

    @property
    def hidden_size(self) -> int:
        """Elements of a row that goes in, and of one that comes out."""
        return self.codec.shape.hidden_size

    def check(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Raise an InputError unless rows `[N, H]`, ids and weights `[N, k]` belong together and to this layer.

        Kernels are handed addresses: what is said here is all that keeps them within these tensors.
        """
        rows, ids, weights = hidden_states.shape, top_k_index.shape, top_k_weights.shape
        if len(rows) != 2 or len(ids) != 2 or rows[0] != ids[0] or ids != weights or rows[1] != self.hidden_size:
            raise InputError(
                f"expected rows [N, {self.hidden_size}], ids [N, k] and weights [N, k] of the same N and k, got "
                f"{list(rows)}, {list(ids)} and {list(weights)}"
            )
        if not (hidden_states.is_floating_point() and top_k_weights.is_floating_point()) or (
            top_k_index.dtype not in INDEX_DTYPES
        ):
            raise InputError(
                f"expected floating rows and weights and whole ids, got {hidden_states.dtype}, {top_k_weights.dtype} "
                f"and {top_k_index.dtype}"
            )
        device = self.base.device
        if not hidden_states.device == top_k_index.device == top_k_weights.device == device:
            raise InputError(
                f"expected all tensors on {device}, where the experts are, got rows on {hidden_states.device}, ids on "
                f"{top_k_index.device} and weights on {top_k_weights.device}; move the inputs there"
            )

    def run_expert(self, hidden_states: Tensor, weights: ExpertWeights, index: int = 0) -> Tensor:
        """Expert `index` of `weights` on its rows `[n, H]`, in the dtype of the rows."""
        hidden = self.activation(_linear(hidden_states, weights.up, weights.up_bias, index))
        output = _linear(hidden, weights.down, weights.down_bias, index)
        return output if self.post_norm is None else self.post_norm(output)


def _linear(rows: Tensor, weights: Tensor, bias: Tensor | None, index: int) -> Tensor:
    product = F.linear(rows, weights[index].to(rows.dtype))
    # Added on its own, as in Transformers' eager loop: fused, it would be rounded with the product.
    return product if bias is None else product + bias[index].to(rows.dtype)
