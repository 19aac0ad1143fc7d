"""Made-up routing with the statistics of real models: heavy tails, drift, phases, locality. Seeded; no model needed.

Token t of a workload w chooses in every layer the `top_k` largest of

    skew * (sqrt(shared) * a[e] + sqrt(1 - shared) * b[w, e]) + drift * d[e, t] + locality * z[e, t] + gumbel[e, t]

and weighs them by the softmax of the same sums without the noise. `a` and `b` are standard normal and fixed; `d` and
`z` are stationary Gaussian processes that forget over `drift_tokens` and `locality_tokens`. The Gumbel noise makes a
choice a draw without replacement in proportion to `exp(...)` (Gumbel top-k: Kool et al., 2019).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynaexq.traces.trace_file import TraceHeader, TraceWindow, TraceWriter
from dynaexq.types import ExpertShape

PHASES = ("text", "code", "arithmetic")


@dataclass(frozen=True)
class Workload:
    """Parameters of made-up traffic; see the module for the formula, and `WORKLOADS` for what fixes each.

    Attributes:
        skew: standard deviation of an expert's standing log-preference.
        shared: correlation of that preference between two phases.
        drift, drift_tokens: standard deviation and time scale of what a document prefers.
        locality, locality_tokens: the same for a few neighboring tokens.
        dense: bytes of all weights that are not experts.
    """

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dense: int
    skew: float
    shared: float
    drift: float
    drift_tokens: float
    locality: float
    locality_tokens: float

    def header(self) -> TraceHeader:
        """The header of a trace of this workload."""
        shape = ExpertShape(self.hidden_size, self.intermediate_size, 2 * self.intermediate_size, False, False)
        layers = tuple(f"model.layers.{layer}.mlp" for layer in range(self.num_layers))
        return TraceHeader(layers, self.num_experts, self.top_k, expert=shape, dense=self.dense)


WORKLOADS = {
    "qwen3-30b": Workload(48, 128, 8, 2048, 768, 3_100_000_000, 0.75, 0.28, 0.25, 1500, 0.2, 12),
    "qwen3-next-80b": Workload(48, 512, 10, 2048, 512, 6_600_000_000, 0.6, 0.45, 0.1, 1500, 2.4, 50),
    "qwen3-235b": Workload(94, 128, 8, 4096, 1536, 16_000_000_000, 0.75, 0.28, 0.25, 1500, 0.2, 12),
    "deepseek-v3": Workload(58, 256, 8, 7168, 2048, 34_000_000_000, 0.75, 0.28, 0.25, 1500, 0.2, 12),
    "flat": Workload(48, 128, 8, 2048, 768, 3_100_000_000, 0.0, 0.0, 0.0, 1500, 0.0, 12),
}
"""Shapes of published models, and what was measured on models like them. With a fifth of the experts upgraded:

- `qwen3-30b`: `skew` from what a set chosen for a phase covers (0.70 on a small trained model; a recovered share
  of 0.77 is reported for this one); `shared` from the overlap of two workloads' busiest sixth (28 to 40 %) and from
  what a set for their mixture covers (0.54); `drift` and `locality` from what a set chosen for 128 tokens covers
  beyond that of the phase (0.715 against 0.703).
- `qwen3-next-80b`: 512-expert models have no static hot set (a list of 32 made beforehand meets a tenth of the
  choices: `skew`; 1,300 tokens touch 98 % of the experts) but repeat themselves at once (the 64 and the 128 experts
  used last meet 67 and 81 %: `locality` and `locality_tokens`).
- `qwen3-235b`, `deepseek-v3` (58 of its 61 layers are sparse): their shapes, with the statistics of `qwen3-30b`,
  as none were published for them.
- `flat`: nothing to follow.

`tests/traces/test_traces.py` measures these figures. The weights of the choices are those of the softmax and are not
fitted.
"""


def generate(
    path: str | Path, workload: Workload, tokens_a_phase: int, num_phases: int, window: int = 8, seed: int = 0
) -> None:
    """Write the trace of `num_phases` phases, which take turns among text, code and arithmetic.

    Args:
        window: tokens between two ticks; at batch 1, the `update_interval` of the model that is imitated.
    """
    rng = np.random.default_rng(seed)
    traffic = _Traffic(workload, rng)
    with TraceWriter(path, workload.header()) as writer:
        for phase in range(num_phases):
            writer.mark(PHASES[phase % len(PHASES)])
            for first in range(0, tokens_a_phase, window):
                tokens = min(window, tokens_a_phase - first)
                writer.add(traffic.window(phase % len(PHASES), tokens))


class _Traffic:
    """The state of the two processes, and draws from them. Arrays are float32 `[L, E]`."""

    def __init__(self, workload: Workload, rng: np.random.Generator):
        self._workload, self._rng = workload, rng
        shape = self._shape = (workload.num_layers, workload.num_experts)
        common = rng.standard_normal(shape, dtype=np.float32)
        own = rng.standard_normal((len(PHASES), *shape), dtype=np.float32)
        shared = workload.shared
        self._standing = workload.skew * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
        self._drift, self._local = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))

    def window(self, phase: int, tokens: int) -> TraceWindow:
        """What `tokens` tokens in a row are routed to."""
        mass = np.zeros(self._shape)
        for preference in self._preferences(phase, tokens):
            chosen, weights = self._choices(preference)
            mass[np.arange(len(mass))[:, None], chosen] += weights
        return TraceWindow(mass, np.full(len(mass), tokens), tokens)

    def _preferences(self, phase: int, tokens: int) -> Iterator[np.ndarray]:
        workload = self._workload
        for _ in range(tokens):
            self._drift = self._next(self._drift, workload.drift, workload.drift_tokens)
            self._local = self._next(self._local, workload.locality, workload.locality_tokens)
            yield self._standing[phase] + workload.drift * self._drift + workload.locality * self._local

    def _next(self, state: np.ndarray, strength: float, tokens: float) -> np.ndarray:
        """One step of a stationary first-order process whose correlation falls to 1/e over `tokens`."""
        if not strength:
            return state
        kept = np.float32(np.exp(-1 / tokens))
        return kept * state + np.sqrt(1 - kept**2) * self._rng.standard_normal(self._shape, dtype=np.float32)

    def _choices(self, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts `[L, k]` of one token and their weights, which sum to one in each layer."""
        draws = self._rng.standard_exponential(self._shape, dtype=np.float32)
        noise = -np.log(np.maximum(draws, np.finfo(np.float32).tiny))
        chosen = np.argpartition(preference + noise, -self._workload.top_k, axis=1)[:, -self._workload.top_k :]
        weights = np.exp(np.take_along_axis(preference, chosen, axis=1))
        return chosen, weights / weights.sum(1, keepdims=True)
