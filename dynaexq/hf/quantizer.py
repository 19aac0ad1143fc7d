"""What makes Transformers treat a patched model as a quantised one, so that nothing happens behind its back.

Without it `save_pretrained` would drop the experts in silence, `generate` would compile static caches on its own, and
`Trainer` would try to train constants.
"""

from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynaexq.errors import PatchError


class AttachedConfig(QuantizationConfigMixin):
    """The little that Transformers asks of a quantisation config; the dials are in `model.dynaexq.settings`."""

    def __init__(self) -> None:
        self.quant_method = "dynaexq"


class AttachedQuantizer(HfQuantizer):
    """Attached to a live model by `patch`. It wraps the quantizer that was there, for dense weights in 4 or 8 bits."""

    def __init__(self, wrapped: HfQuantizer | None):
        super().__init__(AttachedConfig(), pre_quantized=False)
        self.wrapped = wrapped

    def is_serializable(self) -> bool:
        raise PatchError(
            "a patched model cannot be saved: its experts are packed; save the original model before patching, "
            "or dynaexq.unpatch(model) first"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters on dense layers can be trained: gradients flow through the experts, which stay constant."""
        return self.wrapped is None or bool(self.wrapped.is_trainable)

    @property
    def is_compileable(self) -> bool:
        """False keeps `generate` from capturing CUDA graphs, which the kernels of today cannot be part of."""
        return False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        raise PatchError(
            "a patched model cannot be dequantised in place; use dynaexq.unpatch(model), or load it again"
        )
