"""A policy of your own: give the upgrades of every layer to the experts with the highest score in it."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import dynaexq

MODEL = Path(__file__).parent / "tiny-moe"
torch.set_num_threads(1)


def best_of_each_layer(score: np.ndarray, upgraded: np.ndarray, slots: int) -> np.ndarray:
    """Which experts to upgrade, bool `[num_layers, num_experts]` with at most `slots` True."""
    per_layer = slots // len(score)
    ranks = np.argsort(np.argsort(-score, axis=1), axis=1)
    return ranks < per_layer


model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
options = dynaexq.DynaExqConfig(update_interval=1)
runtime = dynaexq.patch(
    model, hbm_budget="5MB", tiers=("int2", "int4"), device="cpu", policy=best_of_each_layer, config=options
)
with torch.no_grad():
    for _ in range(4):
        model(torch.arange(1, 129)[None])
runtime.drain()
print("upgraded experts per layer:", (runtime.tiers() > 2).sum(1).tolist())
