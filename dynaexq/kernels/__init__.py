"""Multiply packed experts: the reference, the fast paths that must match it, and the dispatch between them."""

from dynaexq.kernels.custom_op import experts as experts_operator
from dynaexq.kernels.custom_op import linear as linear_operator
from dynaexq.kernels.custom_op import register_layer, register_matrix
from dynaexq.kernels.decode_attention import DecodeAttention, attention
from dynaexq.kernels.decoder_layer import DecoderLayer, DecoderParts, Step, rotated
from dynaexq.kernels.dispatch import (
    arrangement_on,
    compilations,
    compiles_on,
    counts_routing,
    decode_attention,
    decoder_layer,
    dense_product,
    exchange_for,
    expert_gradients,
    expert_mlp,
    linear,
    linear_gradient,
    row_norm,
)
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.kernels.linear_layer import DenseProduct, LinearLayer
from dynaexq.kernels.row_norm import NormKind, RowNorm, rms_norm
from dynaexq.kernels.top_k_routing import RoutingKind, top_k_routing
from dynaexq.memory.graph_sync import PlainExchange

__all__ = [
    "DecodeAttention",
    "DecoderLayer",
    "DecoderParts",
    "DenseProduct",
    "ExpertLayer",
    "LinearLayer",
    "NormKind",
    "PlainExchange",
    "RoutingKind",
    "RowNorm",
    "Step",
    "Upgrades",
    "arrangement_on",
    "attention",
    "compilations",
    "compiles_on",
    "counts_routing",
    "decode_attention",
    "decoder_layer",
    "dense_product",
    "exchange_for",
    "expert_gradients",
    "expert_mlp",
    "experts_operator",
    "linear",
    "linear_gradient",
    "linear_operator",
    "register_layer",
    "register_matrix",
    "rms_norm",
    "rotated",
    "row_norm",
    "top_k_routing",
]
