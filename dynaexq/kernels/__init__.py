"""Multiply packed experts: the reference, the fast paths that must match it, and the dispatch between them."""

from dynaexq.kernels.custom_op import experts as experts_operator
from dynaexq.kernels.custom_op import register_layer
from dynaexq.kernels.dispatch import counts_routing, exchange_for, expert_gradients, expert_mlp
from dynaexq.kernels.expert_layer import ExpertLayer, Upgrades
from dynaexq.memory.graph_sync import PlainExchange

__all__ = [
    "ExpertLayer",
    "PlainExchange",
    "Upgrades",
    "counts_routing",
    "exchange_for",
    "expert_gradients",
    "expert_mlp",
    "experts_operator",
    "register_layer",
]
