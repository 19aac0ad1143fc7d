"""Random layers of packed experts as arguments of a kernel, and what they should give, token by token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaexq.kernels import ExpertLayer, Upgrades
from dynaexq.memory import allocate_bytes
from dynaexq.quantization import IN_STRIPS, ROW_BY_ROW, Arrangement, ExpertCodec, ExpertWeights
from dynaexq.types import ExpertShape

EXPERTS = 8
UPGRADED = (0, 2, 3, 7)
GATED = ExpertShape(hidden_size=64, intermediate_size=32, up_rows=64, has_bias=False, transposed=False)
SHAPES = {
    "gated": GATED,
    "no gate": ExpertShape(64, 32, 32, has_bias=False, transposed=False),
    "bias": ExpertShape(64, 32, 64, has_bias=True, transposed=False),
    "transposed, bias": ExpertShape(64, 32, 64, has_bias=True, transposed=True),
    "transposed, padded": ExpertShape(80, 48, 96, has_bias=False, transposed=True),
    "padded": ExpertShape(72, 40, 80, has_bias=False, transposed=False),
}

# Columns of the two matrices: blocks of 256, 128 and 64, padding; rows that no tile, panel or vector divides.
UGLY = {
    "256 and 128": ExpertShape(256, 128, 256, has_bias=False, transposed=False),
    "128 and 320, bias": ExpertShape(128, 320, 640, has_bias=True, transposed=False),
    "704 and 72": ExpertShape(704, 72, 144, has_bias=False, transposed=False),
    "200 and 90, transposed, bias": ExpertShape(200, 90, 180, has_bias=True, transposed=True),
    "no gate, 80 and 130": ExpertShape(80, 130, 130, has_bias=True, transposed=False),
}

# RMS of the error over RMS of the result. The fast path rounds weights, rows and sums to the dtype of the rows: in 16
# bits some ten roundings of 0.3 eps each; in float32 what is left is the order of the sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5 * 2**-7, torch.float16: 1.5 * 2**-10}


@dataclass(frozen=True)
class Case:
    """The arguments of a kernel."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    layer: ExpertLayer
    upgrades: Upgrades

    def run(self, kernel: Callable[..., Tensor]) -> Tensor:
        return kernel(self.hidden_states, self.top_k_index, self.top_k_weights, self.layer, self.upgrades)


def named(case: Case) -> Case:
    """The same, its activation under its name, so that kernels may compute it themselves."""
    name = "silu" if case.layer.activation is silu_gate else "relu2"
    return replace(case, layer=replace(case.layer, activation_name=name))


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def squared_relu(up: Tensor) -> Tensor:
    return F.relu(up).square()


def distinct_choices(num_tokens: int, k: int) -> Tensor:
    return torch.rand(num_tokens, EXPERTS).argsort(1)[:, :k]


def case(
    tiers: tuple[str, ...],
    dtype: torch.dtype = torch.bfloat16,
    shape: ExpertShape = GATED,
    top_k_index: Tensor | None = None,
    post_norm: Callable[[Tensor], Tensor] | None = None,
    activation_name: str | None = None,
    group_size: int = 64,
    arrangement: Arrangement = IN_STRIPS,
    activations: str = "int16",
    scale_bits: int = 8,
) -> Case:
    """Random experts at `tiers`, those in UPGRADED with their upgrade, and random rows for `top_k_index`."""
    index = distinct_choices(21, 3) if top_k_index is None else top_k_index
    flip = -1 if shape.transposed else 1
    up = torch.randn(EXPERTS, *(shape.up_rows, shape.hidden_size)[::flip]) * 0.2
    down = torch.randn(EXPERTS, *(shape.hidden_size, shape.intermediate_size)[::flip]) * 0.2
    biases = (torch.randn(EXPERTS, shape.up_rows), torch.randn(EXPERTS, shape.hidden_size)) if shape.has_bias else ()
    codec = ExpertCodec(shape, dtype, tiers, group_size, scale_bits=scale_bits, arrangement=arrangement)
    encoded = codec.encode(ExpertWeights(*(part.to(dtype) for part in (up, down, *biases))))
    activation = silu_gate if shape.up_rows == 2 * shape.intermediate_size else squared_relu
    return Case(
        torch.randn(len(index), shape.hidden_size).to(dtype),
        index,
        torch.rand(index.shape).to(dtype),
        ExpertLayer(codec, encoded.base, activation, post_norm, activation_name, activations),
        published(codec, encoded.upgrade),
    )


def fused(tiers: tuple[str, ...], dtype: torch.dtype, shape: ExpertShape, num_tokens: int, **options: Any) -> Case:
    """Three choices per token, and an activation that has a name."""
    name = "silu" if shape.up_rows == 2 * shape.intermediate_size else "relu2"
    return case(tiers, dtype, shape, distinct_choices(num_tokens, 3), activation_name=name, **options)


case_by_rows = partial(case, arrangement=ROW_BY_ROW)
"""As files and GPUs have them."""


def published(codec: ExpertCodec, blocks: Tensor | None) -> Upgrades:
    """The experts in UPGRADED as a table row would publish them, from `blocks` moved to an aligned place."""
    entries = torch.zeros(EXPERTS, dtype=torch.int64)
    if codec.upgrade is None or blocks is None:
        return Upgrades(entries, {}.__getitem__)
    slab = allocate_bytes(blocks.numel(), torch.device("cpu")).view_as(blocks).copy_(blocks)
    rows = {slab[expert].data_ptr(): slab[expert] for expert in UPGRADED}
    entries[list(UPGRADED)] = torch.tensor([address | codec.upgrade.bits for address in rows])
    return Upgrades(entries, rows.__getitem__)


def naive(case: Case) -> Tensor:
    """One token, one choice at a time, in float64."""
    output = torch.zeros(case.hidden_states.shape, dtype=torch.float64)
    for token, choice in torch.ones_like(case.top_k_index).nonzero().tolist():
        expert = int(case.top_k_index[token, choice])
        if not 0 <= expert < EXPERTS:
            continue
        upgrade = case.upgrades.of(expert)
        weights = case.layer.codec.decode(
            case.layer.base[[expert]], None if upgrade is None else upgrade[None], torch.float32
        )
        hidden = weights.up[0].double() @ case.hidden_states[token].double()
        hidden = case.layer.activation(hidden if weights.up_bias is None else hidden + weights.up_bias[0])
        result = weights.down[0].double() @ hidden
        result = result if weights.down_bias is None else result + weights.down_bias[0]
        result = result if case.layer.post_norm is None else case.layer.post_norm(result)
        output[token] += result * case.top_k_weights[token, choice].double()
    return output.float()
