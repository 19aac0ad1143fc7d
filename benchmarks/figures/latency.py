"""Models that take requests, and how long each takes: the prompt, then a token a step. It compares nothing."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dynaexq.hf.discovery import find_sparse_layers

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
GATHERED_BYTES = 2 * 2**30  # batched_mm copies the weights of every pair of token and expert
TRIALS = 3


@dataclass(frozen=True)
class Request:
    """Seconds of one prompt, and of every step after it."""

    prompt: float
    steps: list[float]

    def tokens_per_second(self, batch: int) -> float:
        """Tokens written, over the whole time that it took."""
        return batch * len(self.steps) / (self.prompt + sum(self.steps))


@dataclass
class Contestant:
    """A model that takes requests, and before each phase of one what `prepare(phase, batch)` does to it."""

    model: PreTrainedModel
    prepare: Callable[[str, int], None] = lambda phase, batch: None
    requests: dict[int, list[Request]] = field(default_factory=dict)

    def serve(self, ids: Tensor, prompt: int) -> Request:
        """Read `ids [batch, T]`: `prompt` of them at once, then one a step, each time up to the next token."""
        batch = len(ids)
        self.prepare("prompt", batch)
        seconds, output = timed(self.model, ids[:, :prompt], use_cache=True)
        self.prepare("step", batch)
        steps = []
        for position in range(prompt, ids.shape[1]):
            # The text goes on as it was written, so that every contestant computes the same tokens.
            step, output = timed(self.model, ids[:, position : position + 1], past_key_values=output.past_key_values)
            steps.append(step)
        return Request(seconds, steps)


class FastestImplementation:
    """Sets, before each phase, the implementation of the experts that was fastest in a trial of it."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.chosen = model, dict[tuple[str, int], str]()
        layer = find_sparse_layers(model)[0]
        weights = sum(parameter.nbytes for parameter in layer.parameters.values())
        config = model.config.get_text_config()
        self._pair_nbytes = weights // layer.num_experts * config.num_experts_per_tok

    def __call__(self, phase: str, batch: int) -> None:
        chosen = self.chosen.get((phase, batch))
        if chosen is not None:
            self.model.set_experts_implementation(chosen)

    def try_out(self, ids: Tensor, prompt: int) -> None:
        """Let every implementation serve a few requests."""
        contestant, times = Contestant(self.model), dict[str, list[Request]]()
        for _ in range(TRIALS):
            for name in IMPLEMENTATIONS:
                if name == "batched_mm" and ids[:, :prompt].numel() * self._pair_nbytes > GATHERED_BYTES:
                    continue
                self.model.set_experts_implementation(name)
                times.setdefault(name, []).append(contestant.serve(ids, prompt))
        by_prompt = {name: min(request.prompt for request in found) for name, found in times.items()}
        by_step = {name: min(statistics.median(request.steps) for request in found) for name, found in times.items()}
        for phase, found in (("prompt", by_prompt), ("step", by_step)):
            self.chosen[phase, len(ids)] = min(found, key=found.__getitem__)


def timed(model: PreTrainedModel, ids: Tensor, **cache: Any) -> tuple[float, Any]:
    """Seconds until the next tokens are known on the host, and the output."""
    start = time.perf_counter()
    output = model(ids, **cache)
    output.logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - start, output
