"""Load a checkpoint under a budget: its 16-bit experts are read a few at a time and never held together."""

from pathlib import Path

from transformers import AutoModelForCausalLM

import dynaexq

MODEL = Path(__file__).parent / "tiny-moe"

config = dynaexq.DynaExqConfig(hbm_budget="5MB", device="cpu")
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)

plan = model.dynaexq.plan
print(f"tiers {plan.tiers}, chosen for {plan.budget:,} bytes: {plan.num_slots} experts hold the upgrade at a time")
for part, nbytes in model.dynaexq.memory().items():
    print(f"{part:>10} {nbytes:>10,} bytes")
