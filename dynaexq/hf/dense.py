"""The dense linear layers of a model in 4 to 8 bits: in our own formats, or by bitsandbytes through Transformers.

Either way a layer gets a quantized *twin*, and Transformers a quantizer that knows how such layers are loaded and
saved. Routers, norms and embeddings stay as they are.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from dynaexq.errors import SettingsError
from dynaexq.hf.calibration import calibration_for
from dynaexq.hf.compat import text_config
from dynaexq.hf.discovery import SparseLayer
from dynaexq.hf.packed_dense import DenseFormat, PackedDense, packed_twin
from dynaexq.quantization import LinearCodec
from dynaexq.settings import DENSE_FORMATS, Settings
from dynaexq.weights.calibration import Calibration

NF4_BLOCK = 64
NF4_TABLE_NBYTES = 64
"""Weights that share a float32 scale in bitsandbytes' NF4, and the bytes of each layer's table of sixteen values."""


def dense_quantizer(settings: Settings, dtype: torch.dtype, pre_quantized: bool) -> HfQuantizer:
    """What loads and saves the dense layers as `settings.dense`; bitsandbytes multiplies in `dtype`."""
    if settings.dense in DENSE_FORMATS:
        return PackedDense(_format(settings), pre_quantized, partial(calibration_for, settings))
    if settings.dense == "bnb-8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)


def quantized_linears(
    model: Any,
    layers: Sequence[SparseLayer],
    settings: Settings,
    device: torch.device,
    calibration: Calibration | None = None,
) -> dict[str, nn.Module]:
    """Quantized twins, on `device`, of the linear layers of a loaded model, by path; the model is left alone.

    Args:
        calibration: what is known of the inputs; bitsandbytes does not use it.
    """
    if settings.dense in DENSE_FORMATS:
        codecs = _format(settings).codecs(model, layers)
        return {
            path: packed_twin(path, model.get_submodule(path), codec, device, settings.activations, calibration)
            for path, codec in codecs.items()
        }
    return {path: _quantized(linear, str(settings.dense), device) for path, linear in _linears(model)}


def bytes_saved(model: Any, layers: Sequence[SparseLayer], settings: Settings) -> int:
    """Bytes that `settings.dense` takes off the weights of `model`, which may be on the meta device.

    By bitsandbytes, a weight takes half a byte and its share of a float32 per 64 of them in 4 bits, a byte and its
    share of a float32 per row in 8. A head that was tied to the embedding gets bytes of its own.
    """
    if settings.dense is None:
        return 0
    if settings.dense not in DENSE_FORMATS:
        return sum(linear.weight.nbytes - _quantized_nbytes(linear, settings.dense) for _, linear in _linears(model))
    tied = getattr(model, "all_tied_weights_keys", {})
    return sum(
        (0 if f"{path}.weight" in tied else model.get_submodule(path).weight.nbytes) - codec.nbytes
        for path, codec in _format(settings).codecs(model, layers).items()
    )


def gathered_bytes(model: Any, settings: Settings) -> int:
    """Bytes of the embedding, of which a token reads a row; 0 where a head that is not packed reads all of it."""
    embedding, is_shared = model.get_input_embeddings(), getattr(text_config(model), "tie_word_embeddings", False)
    return 0 if is_shared and settings.dense not in DENSE_FORMATS else int(embedding.weight.nbytes)


def dense_codecs(model: Any, layers: Sequence[SparseLayer], settings: Settings) -> dict[str, LinearCodec]:
    """What packs the dense layers of a model on the meta device that is written to a checkpoint, by path.

    Raises:
        SettingsError: bitsandbytes packs them, and does so when they are loaded.
    """
    if settings.dense is None:
        return {}
    if settings.dense not in DENSE_FORMATS:
        raise SettingsError(
            f"a checkpoint is packed with dense layers in 16 bit or as {', '.join(DENSE_FORMATS)}, and "
            f"dense={settings.dense!r} was asked for; leave it out here, and give it when the checkpoint is loaded"
        )
    return _format(settings).codecs(model, layers)


def _format(settings: Settings) -> DenseFormat:
    codec = settings.group_size, settings.quantizer, settings.scale_bits
    return DenseFormat(str(settings.dense), settings.head, *codec, settings.activations)


def _quantized_nbytes(linear: nn.Linear, dense: str) -> int:
    weights = linear.weight.numel()
    if dense == "bnb-8bit":
        return weights + 4 * linear.out_features
    return -(-weights // 2) + 4 * -(-weights // NF4_BLOCK) + NF4_TABLE_NBYTES


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that Transformers would have quantized, by path."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    for path, module in model.named_modules():
        if type(module) is nn.Linear and not any(path == skip or path.startswith(f"{skip}.") for skip in skipped):
            yield path, module


def _quantized(linear: nn.Linear, dense: str, device: torch.device) -> nn.Module:
    import bitsandbytes  # where it is wanted: it logs when it is imported

    has_bias, weight = linear.bias is not None, linear.weight.detach()
    sizes = (linear.in_features, linear.out_features, has_bias)
    twin: Any
    with torch.device("meta"):
        if dense == "bnb-8bit":
            twin = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        else:
            twin = bitsandbytes.nn.Linear4bit(
                *sizes, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=False
            )
    kind = type(twin.weight)
    twin.weight = kind(weight.cpu(), requires_grad=False, **_options(twin.weight)).to(device)
    if has_bias:
        twin.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return twin.train(linear.training).requires_grad_(False)


def _options(weight: Any) -> dict[str, Any]:
    names = ("quant_type", "blocksize", "compress_statistics", "quant_storage", "module", "has_fp16_weights")
    return {name: vars(weight)[name] for name in names if name in vars(weight)}
