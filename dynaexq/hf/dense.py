"""The dense linear layers of a model in 4 or 8 bits, through bitsandbytes and Transformers' quantizers for it."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer


def dense_quantizer(dense: str, dtype: torch.dtype, pre_quantized: bool) -> HfQuantizer:
    """Transformers' quantizer for `dense`, `"bnb-4bit"` (NF4) or `"bnb-8bit"`; matrices are multiplied in `dtype`."""
    if dense == "bnb-8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)


def quantized_linears(model: Any, dense: str, device: torch.device) -> dict[str, nn.Module]:
    """Quantised twins, on `device`, of the linear layers of a loaded model, by path; the model is left alone."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    return {
        path: _quantized(module, dense, device)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not any(path == skip or path.startswith(f"{skip}.") for skip in skipped)
    }


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
