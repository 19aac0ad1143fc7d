"""The CUDA path in Triton, and the only room that knows it: experts of several precisions in one launch."""

from dynaexq.kernels.triton.counting import add_routing
from dynaexq.kernels.triton.graph_sync import TritonExchange
from dynaexq.kernels.triton.launch import expert_mlp

__all__ = ["TritonExchange", "add_routing", "expert_mlp"]
