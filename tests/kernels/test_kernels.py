"""Expert kernels: the fast path against the reference, the reference against one token and one choice at a time.

All on ugly shapes: rows that pack with padding, experts nobody asked for, ids that belong to other ranks, no rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from dynaexq.kernels import ExpertLayer, Upgrades, cpu, reference
from dynaexq.kernels.cpu import torch_path
from dynaexq.memory import allocate_bytes
from dynaexq.planning.budget import TIER_CHOICES
from dynaexq.quantization import ExpertCodec, ExpertWeights
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

# RMS of the error over RMS of the result. The fast path rounds weights, rows and sums to the dtype of the rows: in 16
# bits some ten roundings of 0.3 eps each; in float32 what is left is the order of the sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5 * 2**-7, torch.float16: 1.5 * 2**-10}

each_ladder = pytest.mark.parametrize("tiers", [*TIER_CHOICES, ("int2", "fp16")], ids="+".join)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_fast_kernel = pytest.mark.parametrize("kernel", [torch_path, cpu], ids=["torch_cpu", "cpu"])
each_kernel = pytest.mark.parametrize("kernel", [reference, torch_path, cpu], ids=["reference", "torch_cpu", "cpu"])


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
) -> Case:
    """Random experts at `tiers`, those in UPGRADED with their upgrade, and random rows for `top_k_index`."""
    index = distinct_choices(21, 3) if top_k_index is None else top_k_index
    flip = -1 if shape.transposed else 1
    up = torch.randn(EXPERTS, *(shape.up_rows, shape.hidden_size)[::flip]) * 0.2
    down = torch.randn(EXPERTS, *(shape.hidden_size, shape.intermediate_size)[::flip]) * 0.2
    biases = (torch.randn(EXPERTS, shape.up_rows), torch.randn(EXPERTS, shape.hidden_size)) if shape.has_bias else ()
    codec = ExpertCodec(shape, dtype, tiers, group_size)
    encoded = codec.encode(ExpertWeights(*(part.to(dtype) for part in (up, down, *biases))))
    activation = silu_gate if shape.up_rows == 2 * shape.intermediate_size else squared_relu
    return Case(
        torch.randn(len(index), shape.hidden_size).to(dtype),
        index,
        torch.rand(index.shape).to(dtype),
        ExpertLayer(codec, encoded.base, activation, post_norm, activation_name),
        published(codec, encoded.upgrade),
    )


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


@each_ladder
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_reference_is_the_weighted_sum_over_the_choices_of_each_token(tiers, shape):
    got = case(tiers, torch.float32, shape)
    assert_close(f"{tiers} {shape}", naive(got), got.run(reference.expert_mlp), TOLERANCE[torch.float32])


@each_ladder
@each_dtype
@each_fast_kernel
def test_the_cpu_paths_follow_the_reference_with_some_experts_upgraded_and_some_not(tiers, dtype, kernel):
    got = case(tiers, dtype)
    allowed = 0 if tiers == ("fp16",) else TOLERANCE[dtype]
    assert_close(f"{tiers} {dtype}", got.run(reference.expert_mlp), got.run(kernel.expert_mlp), allowed)


@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16"), ("fp16",)], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_fast_kernel
def test_the_cpu_paths_follow_the_reference_for_every_kind_of_expert(tiers, shape, kernel):
    got = case(tiers, shape=shape)
    allowed = 0 if tiers == ("fp16",) else TOLERANCE[torch.bfloat16]
    assert_close(f"{tiers} {shape}", got.run(reference.expert_mlp), got.run(kernel.expert_mlp), allowed)


@pytest.mark.parametrize(
    "top_k_index",
    [
        pytest.param(torch.tensor([[5, 2]]), id="one token"),
        pytest.param(torch.full((9, 1), 3), id="all tokens on one expert"),
        pytest.param(torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [EXPERTS, 7], [1, 0]]), id="ids of other ranks"),
        pytest.param(torch.tensor([[-1, 3], [3, -1], [-1, -1]]), id="negative ids"),
        pytest.param(torch.full((4, 2), EXPERTS), id="no token routed here"),
        pytest.param(torch.arange(33).view(11, 3) % EXPERTS, id="eleven tokens, three choices"),
        pytest.param(torch.arange(EXPERTS).flip(0)[None], id="one token, all experts"),
        pytest.param(torch.empty(0, 2, dtype=torch.int64), id="no tokens"),
    ],
)
@each_kernel
def test_every_kernel_takes_any_routing(kernel, top_k_index):
    got = case(("int2", "int4"), torch.float32, top_k_index=top_k_index)
    assert_close("routing", naive(got), got.run(kernel.expert_mlp), TOLERANCE[torch.float32])


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "fp16")], ids="+".join)
@pytest.mark.parametrize("experts_at_once", [0, 1, 3])
def test_experts_decoded_in_several_groups_give_the_same_bits(monkeypatch, tiers, experts_at_once):
    got = case(tiers)
    in_one_group = got.run(torch_path.expert_mlp)
    monkeypatch.setattr(torch_path, "DECODED_WEIGHTS", experts_at_once * GATED.num_weights)
    assert_close(f"{experts_at_once} at once", in_one_group, got.run(torch_path.expert_mlp), 0)


@each_kernel
def test_the_norm_behind_an_expert_comes_before_its_routing_weight(kernel):
    got = case(("int4",), torch.float32, post_norm=partial(F.rms_norm, normalized_shape=(GATED.hidden_size,)))
    assert_close("post norm", naive(got), got.run(kernel.expert_mlp), TOLERANCE[torch.float32])
