"""Where dynaexq meets Transformers: finding experts, patching, and looking like a quantised model. Nowhere else."""

from dynaexq.hf.patcher import patch, unpatch

__all__ = ["patch", "unpatch"]
