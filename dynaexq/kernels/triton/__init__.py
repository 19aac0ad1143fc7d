"""The CUDA path in Triton, and the only room that knows it: experts of several precisions in one launch."""

from dynaexq.kernels.triton.launch import DTYPES, expert_mlp

__all__ = ["DTYPES", "expert_mlp"]
