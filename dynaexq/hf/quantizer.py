"""dynaexq as Transformers' quantizers are: what `from_pretrained` drives, and what a patched model carries.

Without it `save_pretrained` would drop the experts in silence, `generate` would compile static caches on its own, and
`Trainer` would try to train constants. Dense weights in 4 to 8 bits are left to the quantizer it wraps.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from dynaexq.checkpoint import QUANT_METHOD
from dynaexq.errors import PatchError, SettingsError
from dynaexq.hf.answers import ANSWERS
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.dense import dense_quantizer
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.hf.distributed import check_distribution
from dynaexq.hf.load import CheckpointLoad
from dynaexq.hf.model_patch import RECORD
from dynaexq.hf.planning import resolve_device, with_dense_chosen
from dynaexq.runtime.experts import saved_apart


class DynaExqQuantizer(HfQuantizer):
    """Hides the experts while Transformers loads the rest, then reads them itself, a few at a time.

    Args:
        pre_quantized: whether the configuration comes from the checkpoint.
        wrapped: the quantizer of the dense weights of a model that is loaded already.
    """

    requires_calibration = False

    def __init__(
        self, quantization_config: DynaExqConfig, pre_quantized: bool = False, wrapped: HfQuantizer | None = None
    ):
        self.settings = quantization_config.settings(stored=pre_quantized)
        stored_dense = (quantization_config.packed or {}).get("dense")
        if stored_dense is not None and self.settings.dense == "auto":
            self.settings = replace(self.settings, dense=stored_dense)
        if stored_dense is not None and self.settings.dense != stored_dense:
            raise SettingsError(
                f"dense={self.settings.dense!r} cannot be had from a checkpoint saved with {stored_dense!r}; leave "
                "it out, or load the 16-bit checkpoint"
            )
        # To Transformers it says how the dense weights are stored: it never gets to see the experts.
        super().__init__(quantization_config, pre_quantized=stored_dense is not None)
        self.wrapped = wrapped
        self.follows_replays = False
        """Whether precision goes on changing while CUDA graphs are replayed; known when a runtime is attached."""
        self._load: CheckpointLoad | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called before loading, and again once an automatic device map is known, when placeholders are dropped."""
        if self._load is not None:
            self._load.device_map_is_known()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._wrap_dense(dtype)
        return dtype

    def _wrap_dense(self, dtype: torch.dtype) -> None:
        if self.settings.dense not in (None, "auto"):
            self.wrapped = dense_quantizer(self.settings, dtype, self.pre_quantized)

    def update_device_map(self, device_map: Any) -> Any:
        """One device for everything unless the user says otherwise."""
        if device_map is None:
            device = resolve_device(self.settings)
            return {"": device if device.type == "cpu" else device.index}
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if self.settings.device is not None and devices != {str(resolve_device(self.settings))}:
            raise SettingsError(
                f"expected device={self.settings.device!r} or device_map={device_map!r}, got both; leave one out"
            )
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """No device gets more weights than the budget allows."""
        budget = self.settings.hbm_budget
        if isinstance(budget, str):
            return max_memory
        return {name: size if name in ("cpu", "disk") else min(size, budget) for name, size in max_memory.items()}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.settings.dense == "auto":
            self._choose_dense(model, kwargs.get("device_map"))
        if self.wrapped is not None:
            self.wrapped._process_model_before_weight_loading(model, **kwargs)
        self._load = CheckpointLoad(
            model, self.quantization_config, self.settings, kwargs.get("checkpoint_files"), kwargs.get("device_map")
        )

    def _choose_dense(self, model: Any, device_map: Any) -> None:
        """Put a format in the place of `dense="auto"`, now that the sizes of the model are known."""
        layers = find_sparse_layers(model, on_meta=True)
        check_distribution(model.config, layers, self.settings.dense)
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(devices) > 1:
            raise SettingsError(
                f'dense="auto" is chosen for one device, and device_map names {len(devices)}; give dense="int8", '
                '"int6", "int4" or None'
            )
        stored = self.quantization_config.stored_tiers()
        self.settings = with_dense_chosen(self.settings, model, layers, resolve_device(self.settings), stored=stored)
        self._wrap_dense(layers[0].dtype)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Edit the tensor parallel plan; the expert parallel plan is right as it is."""
        if self._load is not None and plan is model.tp_plan:
            self._load.edit_tensor_plan(plan)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.wrapped is not None:
            self.wrapped._process_model_after_weight_loading(model, **kwargs)
        assert self._load is not None, "weights were loaded after the model was processed"
        load, self._load = self._load, None
        load.finish(self, ANSWERS)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.wrapped is not None and self.wrapped.param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        if self.wrapped is None or ".experts." in param_name:
            return param.element_size()
        return self.wrapped.param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> Any:
        return self._inner.get_quantize_ops()

    def get_load_operations(self) -> dict[str, Any]:
        return {} if self.wrapped is None else self.wrapped.get_load_operations()

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.wrapped is None else self.wrapped.get_weight_conversions()

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return {} if self.wrapped is None else getattr(self.wrapped, "serialized_names", {})

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The dense weights; the experts are written beside them (`save`)."""
        with saved_apart():
            return model.state_dict(), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on dense layers can be trained: gradients flow through the experts, which stay constant."""
        return self.wrapped is None or bool(self.wrapped.is_trainable)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decoding with a static cache: only where precision follows replays."""
        return self.follows_replays and (self.wrapped is None or bool(self.wrapped.is_compileable))

    @property
    def _inner(self) -> HfQuantizer:
        assert self.wrapped is not None, "only dense weights are quantized by Transformers"
        return self.wrapped

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if self.wrapped is not None:
            raise PatchError(
                f"the dense weights were quantized by {type(self.wrapped).__name__}, so the model cannot be "
                "dequantized in place; load it again"
            )
        model.__dict__[RECORD].dequantize()
        return model if dtype is None else model.to(dtype)


AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DynaExqQuantizer  # in the place of the stand-in
