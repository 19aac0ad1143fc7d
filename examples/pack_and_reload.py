"""Pack a checkpoint once, and start from packed experts afterwards: the same bits, without quantizing."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import dynaexq

MODEL = Path(__file__).parent / "tiny-moe"
PROMPT = torch.arange(1, 33)[None]

config = dynaexq.DynaExqConfig(hbm_budget="5MB", tiers=("int2", "int4"), policy="frozen", device="cpu")
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)

with tempfile.TemporaryDirectory() as packed:
    model.save_pretrained(packed)
    for file in sorted(Path(packed).glob("*.safetensors")):
        print(f"{file.stat().st_size:>10,} bytes  {file.name}")
    again = AutoModelForCausalLM.from_pretrained(packed)
    with torch.no_grad():
        same = torch.equal(model(PROMPT).logits, again(PROMPT).logits)
print(f"the reloaded model answers with the same bits: {same}")
