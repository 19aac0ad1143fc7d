"""A model of the shape of Qwen3-30B-A3B with random weights, patched without a 16-bit expert in memory, or plain.

A few random experts are quantized and serve as all of them. What is measured of it is not known here.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

from dynaexq.hf.answers import ANSWERS
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.discovery import find_sparse_layers
from dynaexq.hf.model_patch import ModelPatch
from dynaexq.hf.planning import inspect_model, make_codec, plan
from dynaexq.hf.quantizer import DynaExqQuantizer
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.runtime.device_runtime import DeviceRuntime
from dynaexq.runtime.runtime import Runtime
from dynaexq.settings import Settings
from dynaexq.weights.quantize_experts import open_store
from dynaexq.weights.sources import LoadResult

QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
TOY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
"""For a dry run."""

UPGRADED, DIFFERENT_EXPERTS, TICK_EVERY = 0.2, 16, 4


class RepeatedLoader:
    """A few random experts, quantized once, in the place of all."""

    def place(self, codec: ExpertCodec, base: Tensor, settings: Settings) -> LoadResult:
        """See `sources.ExpertLoader`."""
        shape, (num_layers, num_experts, _) = codec.shape, base.shape
        up, down = (
            torch.empty(DIFFERENT_EXPERTS, *size, dtype=codec.dtype, device=base.device).normal_(0, 0.02)
            for size in ((shape.up_rows, shape.hidden_size), (shape.hidden_size, shape.intermediate_size))
        )
        encoded = codec.encode(ExpertWeights(up, down))
        assert encoded.upgrade is not None, "a pair of two"
        which = torch.arange(num_experts) % DIFFERENT_EXPERTS
        store = open_store(num_layers * num_experts, codec.upgrade_layout.nbytes, settings.host_copy)
        upgrades = encoded.upgrade.cpu()[which]
        for layer in range(num_layers):
            base[layer] = encoded.base[which.to(base.device)]
            store.write(layer * num_experts, upgrades)
        return LoadResult(np.broadcast_to(encoded.errors[which], (num_layers, num_experts, 2)).copy(), store)


class Rotation:
    """A policy that wants a window of experts which moves on at every tick, or stands still."""

    def __init__(self) -> None:
        self.moving, self._start = False, 0

    def __call__(self, score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
        if not self.moving:
            return upgraded
        self._start = (self._start + max(1, slots // 16)) % score.size
        wanted = np.zeros(score.size, dtype=bool)
        wanted[(self._start + np.arange(slots)) % score.size] = True
        return wanted.reshape(score.shape)


def build(sizes: dict[str, Any], tiers: tuple[str, ...], policy: Rotation, device: torch.device) -> PreTrainedModel:
    """A patched random model on the device, a fifth of its experts upgraded."""
    with torch.device(device), patch.object(modeling_qwen3_moe, "Qwen3MoeExperts", _MetaExperts):
        model = (
            Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**sizes), dtype=torch.bfloat16)
            .eval()
            .requires_grad_(False)
        )
    options = {"tiers": tiers, "device": str(device), "policy": policy, "update_interval": TICK_EVERY}
    config = DynaExqConfig(hbm_budget=2**50, quantizer="rtn", **options)
    settings, layers = config.settings(), find_sparse_layers(model, on_meta=True)
    planned = plan(inspect_model(model, layers, settings), settings, device)
    planned = replace(planned, num_slots=int(UPGRADED * planned.num_layers * planned.num_experts))
    planned = replace(planned, budget=planned.total)
    codec = make_codec(layers[0], tiers, settings)
    loaded = DeviceRuntime(model, planned, codec, settings, device, RepeatedLoader())
    changes = ModelPatch(model, layers)
    changes.replace_modules()
    changes.connect(loaded, layers)
    changes.attach(Runtime(model, [(loaded, range(len(layers)))]), DynaExqQuantizer(config), ANSWERS)
    return model


def build_plain(sizes: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The 16-bit model that a user would have without dynaexq, on the device."""
    with torch.device(device):
        model = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**sizes), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


class _MetaExperts(modeling_qwen3_moe.Qwen3MoeExperts):
    """Experts with shapes and no bytes."""

    def __init__(self, config: Any):
        with torch.device("meta"):
            super().__init__(config)
