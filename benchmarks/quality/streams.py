"""A stream of text that moves between workloads, what the 16-bit model says to it, and patched models on it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dynaexq
from dynaexq.cli.demo_corpus import Corpus
from dynaexq.evaluate import evaluate, reference_logits, stream_logits, windows_of

LENGTH = 128
CALIBRATION_WINDOWS = 40
CALIBRATION_SEED = 5

WEIGHTS_ALONE = {"activations": "int16"}
"""Options under which what is lost is lost by the weights; `activations.py` has what rounding rows costs."""


class Phase(NamedTuple):
    """One workload for a while: its windows of token ids, and the 16-bit model's logits for each."""

    domain: str
    windows: list[Tensor]
    reference: list[Tensor]


class Hotness(NamedTuple):
    """Routing mass a token, `[L, E]`, of the calibration text and of every phase of a stream."""

    calibrated: np.ndarray
    foreseen: list[np.ndarray]


class Outcome(NamedTuple):
    """What a stream made of one patched model; see `Stream.send`.

    Attributes:
        kl: KL divergence from 16 bit, nats per token, of each phase.
        loss: cross entropy in nats per token.
        stats: the runtime's, less what filling the slots at the start took.
        nbytes: of all experts, base and upgrades.
    """

    kl: list[float]
    loss: list[float]
    stats: dict[str, Any]
    nbytes: int

    @property
    def mean_kl(self) -> float:
        """Mean over the phases, which are equally long."""
        return float(np.mean(self.kl))


class Stream:
    """Held-out text of each kind in turn, `cycles` times over, never twice the same.

    Args:
        path: a checkpoint directory.
        tokens: of each phase, rounded up to whole windows.
        lengths: tokens of the windows, over and over.
        corpus: the text; prose, code and arithmetic unless it is given.
    """

    def __init__(
        self,
        path: Path,
        tokens: int,
        cycles: int = 1,
        lengths: tuple[int, ...] = (LENGTH,),
        corpus: Corpus | None = None,
    ):
        self.corpus = corpus or Corpus()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        # The eager experts are what a patched model with fp16 gives to the last bit; see docs/log.md.
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager").eval()
        rounds = -(-tokens // sum(lengths))
        found = {
            kind: windows_of(self.tokenizer, self.corpus.documents(kind), rounds * cycles, sum(lengths))
            for kind in self.corpus.kinds
        }
        self.phases = [
            self._phase(domain, found[domain][cycle * rounds : (cycle + 1) * rounds], lengths)
            for cycle in range(cycles)
            for domain in self.corpus.kinds
        ]
        self.tokens_a_phase = rounds * sum(lengths)

    def kl(self, model: PreTrainedModel) -> float:
        """KL divergence of `model` from 16 bit, nats per token, the mean over all phases."""
        return float(np.mean([evaluate(model, phase.windows, phase.reference).kl for phase in self.phases]))

    def first_cycle(self) -> "Stream":
        """The same stream up to the point where workloads come back."""
        shorter = copy.copy(self)
        shorter.phases = self.phases[: len(self.corpus.kinds)]
        return shorter

    def calibration(self, windows: int = CALIBRATION_WINDOWS) -> list[Tensor]:
        """So many windows of each kind from the part of the corpus that the model was trained on."""
        texts = (self.corpus.documents(kind, "train", CALIBRATION_SEED) for kind in self.corpus.kinds)
        return [w for text in texts for w in windows_of(self.tokenizer, text, windows, LENGTH)]

    def hotness(self) -> Hotness:
        """What the 16-bit model routes on the calibration text, which is no part of the stream, and in every phase."""
        calibrated, *foreseen = self._mass([self.calibration(), *(phase.windows for phase in self.phases)])
        return Hotness(calibrated, foreseen)

    def send(
        self,
        model: nn.Module,
        runtime: dynaexq.Runtime,
        before_phase: Callable[[int], None] = lambda index: None,
    ) -> Outcome:
        """Send every phase through a patched `model`.

        Args:
            before_phase: called with the index of each phase before it begins.
        """
        start = runtime.stats()
        kl, loss = [], []
        for index, phase in enumerate(self.phases):
            before_phase(index)
            quality = evaluate(model, phase.windows, phase.reference)
            kl.append(quality.kl)
            loss.append(quality.loss)
        stats, memory = runtime.stats(), runtime.memory()
        for name in ("promotions", "demotions", "bytes_copied"):
            stats[name] -= start[name]
        return Outcome(kl, loss, stats, memory["base"] + memory["upgrade"])

    def patched(self, share: float, **options: Any) -> tuple[nn.Module, dynaexq.Runtime]:
        """A copy of the model with room to upgrade `share` of its experts; it decides after every window."""
        model = copy.deepcopy(self.model)
        config = dynaexq.DynaExqConfig(**WEIGHTS_ALONE | {"update_interval": 1} | options)
        runtime = dynaexq.patch(model, "1TiB", config=config)
        leave_slots(runtime, share)
        return model, runtime

    def _phase(self, domain: str, rounds: list[Tensor], lengths: tuple[int, ...]) -> Phase:
        windows = [window for tokens in rounds for window in tokens.split(list(lengths))]
        return Phase(domain, windows, reference_logits(self.model, windows))

    def _mass(self, streams: list[list[Tensor]]) -> list[np.ndarray]:
        model = copy.deepcopy(self.model)
        found = []
        with dynaexq.patch(model, "1TiB", tiers=("fp16",)) as runtime:
            before = runtime.routed_mass()
            for windows in streams:
                for _ in stream_logits(model, windows):
                    pass
                after = runtime.routed_mass()
                found.append((after - before) / sum(map(len, windows)))
                before = after
        return found


def leave_slots(runtime: dynaexq.Runtime, share: float) -> None:
    """Shrink the budget of a runtime that can upgrade every expert, so that `share` of them have a slot."""
    memory, slots = runtime.memory(), runtime.plan.num_slots
    if slots:
        slot = memory["upgrade"] // slots
        runtime.set_budget(memory["total"] - memory["upgrade"] + round(share * slots) * slot)


def use_one_thread() -> None:
    """Matrices as small as the embedded model's are multiplied faster by one thread than by several."""
    torch.set_num_threads(1)
