"""Two replicas of a packed model behind one HTTP endpoint, by Ray Serve: each has its budget, precision and hotness.

    pip install "dynaexq[ray]"
    python examples/ray_serve.py [CHECKPOINT]                 # until it is interrupted
    curl -d '{"prompt": "def add(a, b):"}' http://127.0.0.1:8000

Ray starts a replica that has died again, and asks each whether it is well; a request that waits for a replica goes to
another one. Without a checkpoint the embedded model is packed first.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from ray import serve
from starlette.requests import Request
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaexq

MODEL = Path(__file__).parent / "tiny-moe"


@serve.deployment(num_replicas=2, max_ongoing_requests=1, health_check_period_s=2, ray_actor_options={"num_cpus": 1})
class Replica:
    """One copy of the model in a process of its own."""

    def __init__(self, packed: str):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(packed)  # under the budget that it keeps
        self.tokenizer = AutoTokenizer.from_pretrained(packed)

    async def __call__(self, request: Request) -> dict[str, object]:
        asked = await request.json()
        inputs = self.tokenizer(asked["prompt"], return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=asked.get("max_tokens", 32), do_sample=False)
        memory = self.model.dynaexq.memory()
        return {
            "text": self.tokenizer.decode(output[0, inputs.input_ids.shape[1] :]),
            "replica": os.getpid(),
            "bytes": memory["total"],
            "budget": memory["budget"],
        }

    def check_health(self) -> None:
        """Called by Ray; a replica that raises is started anew. Precision that stands still costs no answer."""
        if self.model.dynaexq.memory()["total"] > self.model.dynaexq.plan.budget:
            raise RuntimeError("more memory is taken than the budget allows")


def packed_model(target: str) -> str:
    """The embedded model, packed; its tokenizer beside it."""
    config = dynaexq.DynaExqConfig(hbm_budget="5MB", tiers=("int2", "int4"), device="cpu")
    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config).save_pretrained(target)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(target)
    return target


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        packed = sys.argv[1] if sys.argv[1:] else packed_model(directory)
        serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ.get("PORT", "8000"))})
        serve.run(Replica.bind(packed))
        print("ready", flush=True)
        while True:
            time.sleep(1)
