"""One layer of experts on a GPU: first whether it is right, then how long it takes beside Transformers' own.

Times are of a captured graph that runs the layer on many different routings in turn, so that no weights are found in
the cache because the run before has just used them. Where something cannot be captured it is timed as it is.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from clock import duration
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dynaexq.kernels import ExpertLayer, Upgrades, expert_mlp, reference
from dynaexq.memory import allocate_bytes
from dynaexq.quantization import ExpertCodec, ExpertWeights
from dynaexq.types import ExpertShape

DTYPE = torch.bfloat16
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PROMPTS = (512, 2048, 8192)
MIXES = {
    "int3": (("int3",), 0.0),
    "int4": (("int4",), 0.0),
    "20 % int4 over int2": (("int2", "int4"), 0.2),
    "int4 over int2": (("int2", "int4"), 1.0),
    "20 % fp16 over int4": (("int4", "fp16"), 0.2),
    "fp16": (("fp16",), 0.0),
}
"""Pair, and the share of experts with their upgrade; routing is uniform, so it is the share of traffic, too."""

GATHERED_PAIRS = 512  # batched_mm copies the weights of every pair
TOLERANCE = {"cuda": 1e-2, "cpu": 1.5 * 2**-7}
"""Of bfloat16, as in the tests; the CPU's path rounds weights as well."""


@dataclass(frozen=True)
class Shape:
    """One layer of a real model."""

    name: str
    num_experts: int
    choices: int
    hidden_size: int
    intermediate_size: int

    @property
    def expert(self) -> ExpertShape:
        return ExpertShape(self.hidden_size, self.intermediate_size, 2 * self.intermediate_size, False, False)


TOY = Shape("toy", 8, 2, 64, 32)
MODELS = (Shape("Qwen3-30B-A3B", 128, 8, 2048, 768), Shape("Qwen3-Next-80B-A3B", 512, 10, 2048, 512))


@dataclass(frozen=True)
class Mix:
    """A layer whose first experts have their upgrade; they are numbered at random, so routing does not know them."""

    layer: ExpertLayer
    entries: Tensor
    slab: Tensor

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        upgrades = Upgrades(self.entries.clone(), self._bytes_at)  # a snapshot is part of every forward
        return expert_mlp(hidden_states, top_k_index, top_k_weights, self.layer, upgrades)

    def reference(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        upgrades = Upgrades(self.entries, self._bytes_at)
        return reference.expert_mlp(hidden_states, top_k_index, top_k_weights, self.layer, upgrades)

    def expert_bytes(self) -> Tensor:
        """Bytes that a product reads of each expert, `[num_experts]`."""
        base = torch.full_like(self.entries, self.layer.codec.base.nbytes)
        upgraded = self.slab.shape[1] + (0 if self.layer.codec.replaces else base)
        return torch.where(self.entries > 0, upgraded, base)

    def _bytes_at(self, address: int) -> Tensor:
        return self.slab[(address - self.slab.data_ptr()) // self.slab.shape[1]]


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def build(shape: Shape, tiers: tuple[str, ...], share: float, source: Any) -> Mix:
    """The experts of `source` at `tiers`."""
    codec = ExpertCodec(shape.expert, DTYPE, tiers, method="rtn")  # fast, and its bits cost as much as any
    device = source.gate_up_proj.device
    base = allocate_bytes(shape.num_experts * codec.base.nbytes, device).view(shape.num_experts, -1)
    upgraded = torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(0))
    slots = {int(expert): slot for slot, expert in enumerate(upgraded[: int(share * shape.num_experts)])}
    slab = allocate_bytes(max(1, len(slots)) * codec.upgrade_layout.nbytes, device).view(max(1, len(slots)), -1)
    entries = torch.zeros(shape.num_experts, dtype=torch.int64)
    for expert in range(shape.num_experts):
        weights = ExpertWeights(source.gate_up_proj.data[[expert]], source.down_proj.data[[expert]])
        encoded = codec.encode(weights)
        base[expert] = encoded.base[0]
        if expert in slots and encoded.upgrade is not None and codec.upgrade is not None:
            slab[slots[expert]] = encoded.upgrade[0]
            entries[expert] = slab[slots[expert]].data_ptr() | codec.upgrade.bits
    return Mix(ExpertLayer(codec, base, swiglu, activation_name="silu"), entries.to(device), slab)


def source_experts(shape: Shape, device: torch.device) -> Any:
    """Transformers' layer of experts with random weights."""
    config = Qwen3MoeConfig(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts_per_tok=shape.choices,
    )
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(DTYPE).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.02)
    return experts


def routings(shape: Shape, tokens: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random arguments, as many as it takes for their experts to be far more than a cache holds."""
    count = max(2, min(32, 256 // tokens))
    return [
        (
            torch.randn(tokens, shape.hidden_size, dtype=DTYPE, device=device),
            torch.rand(tokens, shape.num_experts, device=device).topk(shape.choices).indices,
            torch.rand(tokens, shape.choices, dtype=DTYPE, device=device),
        )
        for _ in range(count)
    ]


def check(shape: Shape, device: torch.device) -> None:
    """Raise AssertionError unless every mix agrees with the reference: no time is worth anything before that."""
    source = source_experts(shape, device)
    for name, (tiers, share) in MIXES.items():
        mix = build(shape, tiers, share, source)
        for tokens in (1, 16, 2048):
            must_agree(mix, routings(shape, tokens, device)[0], f"{shape.name}, {name}, {tokens} tokens")


def must_agree(mix: Mix, arguments: tuple[Tensor, Tensor, Tensor], what: str) -> None:
    """Raise AssertionError unless a mix answers these arguments as the reference does."""
    expected, got = mix.reference(*arguments).double(), mix.run(*arguments).double()
    error = float((got - expected).norm() / expected.norm())
    assert error <= TOLERANCE[got.device.type], f"{what}: off by {error:.2g} of the reference"


def times(shape: Shape, tokens: tuple[int, ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds of every mix and of Transformers, for so many tokens at once."""
    source = source_experts(shape, device)
    mixes = {name: build(shape, tiers, share, source) for name, (tiers, share) in MIXES.items()}
    for count in tokens:
        arguments = routings(shape, count, device)
        for implementation in ("batched_mm", "grouped_mm"):
            if implementation == "grouped_mm" or count * shape.choices <= GATHERED_PAIRS:
                source.config._experts_implementation = implementation
                yield _row(shape, count, f"Transformers {implementation}", arguments, source.__call__)
        for name, mix in mixes.items():
            row = _row(shape, count, name, arguments, mix.run)
            read = statistics.mean(float(mix.expert_bytes()[ids.unique()].sum()) for _, ids, _ in arguments)
            yield row | {"gigabytes_a_second": read / row["microseconds"] / 1e3}


def _row(shape: Shape, tokens: int, what: str, arguments: Any, call: Callable[..., Tensor]) -> dict[str, Any]:
    microseconds, captured = duration(lambda: [call(*a) for a in arguments], arguments[0][0].device)
    row = {"model": shape.name, "tokens": tokens, "what": what}
    return row | {"microseconds": microseconds / len(arguments), "captured": captured}


def ceilings(device: torch.device, nbytes: int, width: int) -> dict[str, float]:
    """What a card does at best: `nbytes` copied (read and written) and bfloat16 products of `width`, both a second."""
    memory = torch.empty(2, nbytes, dtype=torch.uint8, device=device)
    copied, _ = duration(lambda: memory[0].copy_(memory[1]), device)
    left, right = (torch.randn(width, width, dtype=DTYPE, device=device) for _ in range(2))
    multiplied, _ = duration(lambda: left @ right, device)
    return {
        "copy_gigabytes_a_second": 2 * nbytes / copied / 1e3,
        "bf16_teraflops": 2 * width**3 / multiplied / 1e6,
    }
