"""Dense layers in our own formats, as a quantizer of Transformers: which ones, their twins, and how they are loaded.

A 16-bit checkpoint is loaded as it is, and packed layer by layer before the experts come; a packed one fills the
places that were made for it. No kernel is known.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from dynaexq.errors import QuantizationError
from dynaexq.hf.discovery import SparseLayer, find_sparse_layers
from dynaexq.quantization import LARGEST_WEIGHT, LinearCodec
from dynaexq.runtime.linear import PackedLinear
from dynaexq.types import BITS
from dynaexq.weights.calibration import Calibration

SMALLEST = 32
"""Rows or columns of a matrix below which packing saves nothing that counts, such as the gate of a shared expert."""


@dataclass(frozen=True)
class DenseFormat:
    """How dense layers are packed: at which precision, the head at least at which, and as `ExpertCodec` has it."""

    tier: str
    head: str
    group_size: int
    method: str
    scale_bits: int
    activations: str = "auto"

    def codecs(self, model: Any, layers: Sequence[SparseLayer]) -> dict[str, LinearCodec]:
        """What packs each linear layer, by path.

        The head has a precision of its own because at 4 bits it cost the embedded model as much as all layers of
        attention (docs/log.md).
        """
        head, of_head = model.get_output_embeddings(), max(self.tier, self.head, key=BITS.__getitem__)
        return {
            path: LinearCodec(
                linear.out_features,
                linear.in_features,
                linear.weight.dtype,
                of_head if linear is head else self.tier,
                self.group_size,
                self.method,
                self.scale_bits,
            )
            for path, linear in packable_linears(model, layers)
        }


def packable_linears(model: Any, layers: Sequence[SparseLayer]) -> Iterator[tuple[str, nn.Linear]]:
    """All linear layers but routers, what must stay in float32, and tiny ones."""
    skipped = getattr(model, "_keep_in_fp32_modules", None) or ()
    routers = {id(child) for layer in layers if layer.block is not None for child in layer.block.children()}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or min(module.in_features, module.out_features) < SMALLEST:
            continue
        is_router = id(module) in routers and module.out_features == layers[0].num_experts
        if not is_router and not any(part in skipped for part in path.split(".")):
            yield path, module


def calibrated_linears(model: Any, layers: Sequence[SparseLayer]) -> Iterator[tuple[str, nn.Linear]]:
    """Those whose codes may depend on what is known of their inputs; not the head, whose are of no use at 8 bits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return ((path, linear) for path, linear in packable_linears(model, layers) if linear is not head)


def packed_twin(
    path: str,
    linear: nn.Linear,
    codec: LinearCodec,
    device: torch.device,
    activations: str,
    calibration: Calibration | None = None,
) -> PackedLinear:
    """`linear` packed, on `device`; a QuantizationError names its `path` if no code represents it."""
    bias = None if linear.bias is None else linear.bias.detach().to(device)
    block = packed_weight(path, linear.weight.detach().to(device), codec, calibration)
    return PackedLinear(codec, block, bias, activations).train(linear.training)


def packed_weight(path: str, weight: Tensor, codec: LinearCodec, calibration: Calibration | None = None) -> Tensor:
    """The block of the weight of the layer at `path`, where that lies. Raises as `packed_twin` does."""
    largest = float(weight.abs().amax())  # NaN and infinity survive amax
    if not largest <= LARGEST_WEIGHT:
        raise QuantizationError(
            f"{path}: expected finite weights of at most {LARGEST_WEIGHT:g}, found {largest:g}; repair the "
            "checkpoint, or leave dense out"
        )
    inputs = None if calibration is None else calibration.of_dense(path, weight.shape[1], weight.device)
    return codec.encode(weight, inputs)[0]


def untie(model: Any, path: str) -> str | None:
    """Have the layer at `path` keep a weight of its own; the name of the one that it had shared, if it had."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return tied.pop(f"{path}.weight", None)


class PackedDense(HfQuantizer):
    """What loads and saves dense layers in `quantization_config`.

    Args:
        pre_quantized: whether the checkpoint holds them packed.
        calibration: reads what is known of their inputs, given the model's sparse layers, before the weights are
            loaded.
    """

    requires_calibration = False

    def __init__(
        self,
        quantization_config: DenseFormat,
        pre_quantized: bool = False,
        calibration: Callable[[Sequence[SparseLayer]], Calibration | None] = lambda layers: None,
    ):
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._codecs: dict[str, LinearCodec] = {}
        self._read_calibration = calibration
        self._calibration: Calibration | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = find_sparse_layers(model, on_meta=True)
        self._codecs = self.quantization_config.codecs(model, layers)
        self._calibration = None if self.pre_quantized else self._read_calibration(layers)
        for path, codec in self._codecs.items() if self.pre_quantized else ():
            linear = model.get_submodule(path)
            with torch.device("meta"):
                room = PackedLinear(codec, bias=linear.bias, activations=self.quantization_config.activations)
            model.set_submodule(path, room.train(linear.training))
            untie(model, path)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, codec in () if self.pre_quantized else self._codecs.items():
            linear = model.get_submodule(path)
            activations = self.quantization_config.activations
            twin = packed_twin(path, linear, codec, linear.weight.device, activations, self._calibration)
            model.set_submodule(path, twin)
            untie(model, path)
        self._calibration = None
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
