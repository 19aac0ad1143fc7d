"""The CPU path: the native kernel wherever it applies, vectorized torch everywhere else.

Torch keeps what the kernel does not do: experts that are 16-bit from the start, which must give the very bits of
Transformers' eager loop; a norm behind each expert; and machines without a compiler or without AVX2.
"""

import torch
from torch import Tensor

from dynaexq.kernels import gradients, linear_layer
from dynaexq.kernels.cpu import torch_path
from dynaexq.kernels.cpu.build import AVX512_BF16, instruction_set, load
from dynaexq.kernels.cpu.interface import DTYPES
from dynaexq.kernels.cpu.native import NativeLayer, NativeLinear, NativeProduct
from dynaexq.kernels.cpu.native_decoder import NativeAttention, NativeDecoderLayer, NativeNorm
from dynaexq.kernels.cpu.strips import NativeStrips
from dynaexq.kernels.decoder_layer import DecoderParts, Matrix
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.linear_layer import LinearLayer
from dynaexq.kernels.row_norm import NormKind
from dynaexq.quantization import ROW_BY_ROW, Arrangement

MOST_ROWS, FEWER_ROWS = 16, 4
"""Up to which the native product with a 16-bit matrix is faster than PyTorch's, where one instruction multiplies pairs
of bfloat16, and elsewhere (docs/log.md)."""

MOST_QUERIES, FEWER_QUERIES = 128, 64
"""Rows of queries that share a head of keys, up to which the native attention is faster, there and elsewhere."""


def expert_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
    counts: Tensor | None = None,
) -> Tensor:
    """The same sum as `reference.expert_mlp`; coded weights may be rounded to the dtype of `hidden_states` first.

    `counts` as in `dispatch.expert_mlp`; only the native kernel takes them.
    """
    native = native_layer(layer, hidden_states.dtype)
    if native is None:
        return torch_path.expert_mlp(hidden_states, top_k_index, top_k_weights, layer, upgrades)
    return native(hidden_states, top_k_index, top_k_weights, upgrades.entries, counts)


def expert_gradients(
    grad: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    layer: ExpertLayer,
    upgrades: Upgrades,
) -> tuple[Tensor, Tensor]:
    """As `gradients.expert_gradients`; natively, in float32."""
    native = native_layer(layer, hidden_states.dtype)
    if native is None:
        return gradients.expert_gradients(grad, hidden_states, top_k_index, top_k_weights, layer, upgrades)
    grad_hidden, grad_weights = native.gradients(grad, hidden_states, top_k_index, top_k_weights, upgrades.entries)
    return grad_hidden.to(hidden_states.dtype), grad_weights.to(top_k_weights.dtype)


def counts_routing(hidden_states: Tensor, layer: ExpertLayer) -> bool:
    """Whether the native kernel takes these rows, which counts as it goes."""
    return native_layer(layer, hidden_states.dtype) is not None


def native_layer(layer: ExpertLayer, dtype: torch.dtype) -> NativeLayer | None:
    """`layer` as the native kernel sees it, for rows of `dtype`; None where torch has to take it."""
    key = ("cpu", dtype)
    if key not in layer.prepared:
        layer.prepared[key] = _build(layer, dtype)
    native: NativeLayer | None = layer.prepared[key]
    return native


def _build(layer: ExpertLayer, dtype: torch.dtype) -> NativeLayer | None:
    if not layer.codec.planes or layer.post_norm is not None or dtype not in DTYPES:
        return None
    if layer.codec.arrangement == ROW_BY_ROW:
        return None
    library = load(all_bfloat16=dtype == layer.codec.dtype == torch.bfloat16)
    return None if library is None else NativeLayer(layer, dtype, library.forward)


def arrangement(dtype: torch.dtype) -> Arrangement:
    """In strips, for the native kernel, where there is one for models of `dtype`."""
    all_bfloat16 = dtype == torch.bfloat16
    takes = dtype in DTYPES and load(all_bfloat16) is not None
    return NativeStrips(all_bfloat16) if takes else ROW_BY_ROW


def linear(rows: Tensor, layer: LinearLayer) -> Tensor:
    """As `linear_layer.linear`; natively, codes are multiplied as they are."""
    native = _native_linear(layer, rows.dtype)
    return linear_layer.linear(rows, layer) if native is None else native(rows.contiguous())


def linear_gradient(grad: Tensor, layer: LinearLayer) -> Tensor:
    """As `linear_layer.linear_gradient`; natively, in float32."""
    native = _native_linear(layer, grad.dtype)
    return linear_layer.linear_gradient(grad, layer) if native is None else native.gradient(grad).to(grad.dtype)


def dense_product(weight: Tensor) -> NativeProduct | None:
    """The native product of few rows with a bfloat16 matrix, where it reads that in place; None where it would not."""
    fits = weight.dtype == torch.bfloat16 and weight.is_contiguous() and NativeProduct.takes_columns(weight.shape[1])
    library = load(all_bfloat16=True) if fits else None
    if library is None:
        return None
    return NativeProduct(weight, library.forward, MOST_ROWS if _multiplies_pairs() else FEWER_ROWS)


def row_norm(weight: Tensor, kind: NormKind) -> NativeNorm | None:
    """The native norm of few rows of bfloat16; None where there is none for this weight."""
    fits = weight.dtype == torch.bfloat16 and weight.is_contiguous() and NativeNorm.takes_columns(len(weight))
    library = load(all_bfloat16=True) if fits else None
    return library and NativeNorm(weight, kind, library.normalize)


def decode_attention() -> NativeAttention | None:
    """The native attention of few queries in bfloat16; None where there is no kernel."""
    library = load(all_bfloat16=True)
    return library and NativeAttention(library.attend, _most_queries())


def decoder_layer(parts: DecoderParts) -> NativeDecoderLayer | None:
    """The decoder layer of these parts; None where some of them are not native."""
    norms = (parts.norm, parts.block_norm, *filter(None, (parts.query_norm, parts.key_norm)))
    library, experts = load(all_bfloat16=True), native_layer(parts.experts, torch.bfloat16)
    matrices = (parts.query, parts.key, parts.value, parts.out, parts.router)
    linears = [native for native in map(_native_matrix, matrices) if native is not None]
    if library is None or experts is None or not experts.is_fused or len(linears) < len(matrices):
        return None
    if parts.experts.codec.dtype != torch.bfloat16 or not all(isinstance(norm, NativeNorm) for norm in norms):
        return None
    most_rows = min(linear.most_rows for linear in linears if isinstance(linear, NativeProduct))
    return NativeDecoderLayer(parts, linears, experts, library, most_rows, _most_queries())


def _native_matrix(matrix: Matrix) -> NativeLinear | None:
    if isinstance(matrix, LinearLayer):
        return _native_linear(matrix, torch.bfloat16) if matrix.codec.dtype == torch.bfloat16 else None
    return matrix if isinstance(matrix, NativeLinear) else None


def _most_queries() -> int:
    return MOST_QUERIES if _multiplies_pairs() else FEWER_QUERIES


def _multiplies_pairs() -> bool:
    return instruction_set() is AVX512_BF16


def _native_linear(layer: LinearLayer, dtype: torch.dtype) -> NativeLinear | None:
    if dtype not in layer.prepared:
        takes = dtype in DTYPES and layer.codec.arrangement != ROW_BY_ROW
        library = load(all_bfloat16=dtype == layer.codec.dtype == torch.bfloat16) if takes else None
        layer.prepared[dtype] = library and NativeLinear(
            layer.codec, layer.block, dtype, library.forward, layer.activations
        )
    native: NativeLinear | None = layer.prepared[dtype]
    return native
