"""Record what a model routes, and replay it under other policies without the model."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import dynaexq
from dynaexq.settings import Settings
from dynaexq.simulator.simulate import simulate
from dynaexq.traces import Trace

MODEL = Path(__file__).parent / "tiny-moe"
torch.set_num_threads(1)
torch.manual_seed(0)

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
options = dynaexq.DynaExqConfig(update_interval=1)
runtime = dynaexq.patch(model, hbm_budget="5MB", tiers=("int2", "int4"), device="cpu", config=options)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "routing.npz"
    with runtime.trace(path), torch.no_grad():
        for _ in range(40):
            model(torch.randint(1, 1000, (1, 64)))
    trace = Trace(path)
    for policy in ("topn", "frozen"):
        settings = Settings(policy=policy, tiers=("int2", "int4"), auto_pause=False)
        outcome = simulate(trace, settings, upgraded=0.2).outcome
        print(f"{policy:>7}: {outcome.removed('policy'):.1%} of the removable error, {outcome.promotions.sum()} moves")
