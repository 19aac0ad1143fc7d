"""Patch a loaded model in place, generate, look at the report, and undo the patch."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaexq

MODEL = Path(__file__).parent / "tiny-moe"

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
prompt = tokenizer("The module defines", return_tensors="pt")

runtime = dynaexq.patch(model, hbm_budget="9MB", tiers=("int4", "fp16"), device="cpu")
output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(output[0]))
print(runtime.report())

dynaexq.unpatch(model)  # exact, as the tier fp16 keeps the experts bit for bit
print(f"unpatched: a {type(model).__name__} in {model.dtype} again")
