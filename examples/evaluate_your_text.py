"""Measure what a budget costs on a text of your own, as KL divergence from the 16-bit model."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaexq
from dynaexq.evaluate import evaluate, reference_logits, windows_of

MODEL = Path(__file__).parent / "tiny-moe"
TEXT = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_text()
torch.set_num_threads(1)

tokenizer = AutoTokenizer.from_pretrained(MODEL)
original = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
windows = windows_of(tokenizer, [TEXT], count=8, length=64)
reference = reference_logits(original, windows)

for budget in ("4.7MB", "5MB", "6.3MB", "9MB"):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    runtime = dynaexq.patch(model, hbm_budget=budget, device="cpu")
    quality = evaluate(model, windows, reference)
    print(f"{budget:>6}: {' + '.join(runtime.plan.tiers):<12} KL {quality.kl:.4f} nats per token")
