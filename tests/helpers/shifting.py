"""A patched tiny model whose traffic shifts from one set of experts to another, and what it should answer then."""

import copy
from typing import Any

import numpy as np
import patching
import tiny
import torch
from torch import Tensor, nn

from dynaexq.quantization.grid_format import ByteGrids
from dynaexq.quantization.quantize import dequantize, quantize
from dynaexq.types import BITS

AMPLE = 10**7
MORNING, EVENING = [[[0, 1]], [[2, 3]]], [[[6, 7]], [[0, 5]]]
"""Experts that all tokens of each layer go to, at first and later."""


def patched(
    tiers: tuple[str, ...] = ("int2", "int4"), slots: int = 4, model: nn.Module | None = None, **options: Any
) -> nn.Module:
    """A tiny float32 model with upgrade slots for four of its sixteen experts; it decides after every forward.

    By the plain moving average, unless told otherwise: what that makes of a few forwards can be said beforehand.
    """
    # 64 columns in both matrices need no padding, which would not be quantized as the weights are by themselves.
    model = tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64) if model is None else model
    usual = {"quantizer": "rtn", "update_interval": 1, "half_life": 8, "hysteresis": 0.5, "num_kinds": 1}
    rt = patching.patch(model, AMPLE, **{"tiers": tiers} | usual | options)
    rt.set_budget(rt.memory()["total"] - (16 - slots) * rt.plan.upgrade.nbytes)
    return model


def run(model: nn.Module, forwards: int = 4) -> Tensor:
    """Several forwards over the prompt; the last one's logits."""
    for _ in range(forwards):
        logits = tiny.logits(model)
    return logits


def upgraded(model: nn.Module) -> list[list[int]]:
    """The experts of each layer that are above the base."""
    rt = model.dynaexq
    return [np.flatnonzero(row > rt.plan.base.bits).tolist() for row in rt.tiers()]


def as_quantized(original: nn.Module, model: nn.Module) -> nn.Module:
    """`original` with each weight replaced by what its code reads at the tier that `model` publishes."""
    naive, pair = copy.deepcopy(original), model.dynaexq.plan.tiers
    fit_bits = BITS[pair[0]] if pair[1] == "fp16" else 4
    with torch.no_grad():
        for layer, block in enumerate(tiny.sparse_blocks(naive)):
            for expert, bits in enumerate(model.dynaexq.tiers()[layer].tolist()):
                for weights in (block.experts.gate_up_proj[expert], block.experts.down_proj[expert]):
                    if bits < 16:
                        code = quantize(weights[None], 64, fit_bits, "rtn", form=ByteGrids.of_weights(weights[None]))
                        kept = code.values & (0xFF << (8 - bits) & 0xFF)
                        weights.copy_(dequantize(kept, code.scale, code.minimum, bits)[0])
    return naive


def assert_answers_as_published(model: nn.Module, original: nn.Module) -> None:
    """The answer of a naive forward over weights dequantized one by one, at the tiers that are published."""
    model.dynaexq.freeze()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(as_quantized(original, model)), rtol=1e-3, atol=1e-3)
