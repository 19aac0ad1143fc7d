"""Watch precision follow the traffic as it moves from prose to code to arithmetic, within one budget."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaexq
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.evaluate import evaluate, windows_of

MODEL = Path(__file__).parent / "tiny-moe"
torch.set_num_threads(1)

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
options = dynaexq.DynaExqConfig(update_interval=1, auto_pause=False)
runtime = dynaexq.patch(model, hbm_budget="5MB", tiers=("int2", "int4"), device="cpu", config=options)

for domain in DOMAINS:
    before = runtime.stats()
    evaluate(model, windows_of(tokenizer, documents(domain), count=8, length=128))
    stats = runtime.stats()
    hot, mass = (stats[name] - before[name] for name in ("hot_mass", "routed_mass"))
    moves = stats["promotions"] - before["promotions"]
    print(f"{domain:>10}: {moves:3} promotions, {hot / mass:.0%} of the routing met an upgraded expert")
print(f"{runtime.memory()['total']:,} of {runtime.plan.budget:,} bytes in use")
