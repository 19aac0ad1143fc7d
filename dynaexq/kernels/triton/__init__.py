"""The CUDA path in Triton, and the only room that knows it: experts of several precisions in one launch."""

from dynaexq.kernels.gradients import expert_gradients
from dynaexq.kernels.linear_layer import linear_gradient
from dynaexq.kernels.reference import arrangement
from dynaexq.kernels.triton.graph_sync import TritonExchange
from dynaexq.kernels.triton.launch import counts_routing, expert_mlp
from dynaexq.kernels.triton.linear import linear
from dynaexq.kernels.triton.routing import add_routing

__all__ = [
    "TritonExchange",
    "add_routing",
    "arrangement",
    "counts_routing",
    "expert_gradients",
    "expert_mlp",
    "linear",
    "linear_gradient",
]
