"""Where dynaexq meets Transformers: finding experts, patching, and looking like a quantised model. Nowhere else."""

from dynaexq.hf.calibration import calibrate
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.patcher import patch, unpatch

__all__ = ["DynaExqConfig", "calibrate", "patch", "unpatch"]
