"""Experts shared out among processes, each with a budget of its own, which answer together as one process does.

    torchrun --nproc-per-node 2 examples/expert_parallel.py [CHECKPOINT]

Needs Transformers 5.21, and a model whose key-value heads can be shared out as well: the embedded one has two. Started
without `torchrun`, it is one process.
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import dynaexq

MODEL = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "tiny-moe"
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


def load(hbm_budget: str, **options: object) -> object:
    # At one precision the answers are the same; with upgrades each rank would follow its own traffic.
    config = dynaexq.DynaExqConfig(hbm_budget=hbm_budget, tiers=("int8",), device="cpu")
    return AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, **options)


def answer(model: object) -> str:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer("The water of the lake", return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0])


whole = load("12MB")
alone = answer(whole)
print(f"one process: {whole.dynaexq.memory()['total']:,} bytes")
if RANKS > 1:
    share = load("9MB", distributed_config=DistributedConfig(tp_size=RANKS, ep_size=RANKS))
    same = answer(share) == alone
    print(f"rank {dist.get_rank()} of {RANKS}: {share.dynaexq.memory()['total']:,} bytes, the same answer: {same}")
    dist.destroy_process_group()
