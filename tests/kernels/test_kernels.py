"""Expert kernels: the fast path against the reference, the reference against one token and one choice at a time.

All on ugly shapes: rows that pack with padding, experts nobody asked for, ids that belong to other ranks, no rows.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernel_cases import EXPERTS, GATED, SHAPES, TOLERANCE, Case, case, case_by_rows, distinct_choices, naive
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from dynaexq.kernels import cpu, decoded, gradients, reference
from dynaexq.kernels.cpu import torch_path
from dynaexq.planning.budget import TIER_CHOICES
from dynaexq.types import ExpertShape

each_pair = pytest.mark.parametrize("tiers", [*TIER_CHOICES, ("int2", "fp16")], ids="+".join)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_fast_kernel = pytest.mark.parametrize("kernel", [torch_path, cpu], ids=["torch_cpu", "cpu"])
each_kernel = pytest.mark.parametrize("kernel", [reference, torch_path, cpu], ids=["reference", "torch_cpu", "cpu"])


@each_pair
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_reference_is_the_weighted_sum_over_the_choices_of_each_token(tiers, shape):
    got = case(tiers, torch.float32, shape)
    assert_close(f"{tiers} {shape}", naive(got), got.run(reference.expert_mlp), TOLERANCE[torch.float32])


@each_pair
@each_dtype
@each_fast_kernel
def test_the_cpu_paths_follow_the_reference_with_some_experts_upgraded_and_some_not(tiers, dtype, kernel):
    got = case(tiers, dtype)
    allowed = 0 if tiers == ("fp16",) else TOLERANCE[dtype]
    assert_close(f"{tiers} {dtype}", got.run(reference.expert_mlp), got.run(kernel.expert_mlp), allowed)


@each_pair
def test_either_arrangement_means_the_same_to_torch(tiers):
    torch.manual_seed(7)
    in_strips = case(tiers)
    torch.manual_seed(7)
    by_rows = case_by_rows(tiers)
    for multiply in (reference.expert_mlp, torch_path.expert_mlp):
        assert torch.equal(in_strips.run(multiply), by_rows.run(multiply))


@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16"), ("fp16",)], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_fast_kernel
def test_the_cpu_paths_follow_the_reference_for_every_kind_of_expert(tiers, shape, kernel):
    got = case(tiers, shape=shape)
    allowed = 0 if tiers == ("fp16",) else TOLERANCE[torch.bfloat16]
    assert_close(f"{tiers} {shape}", got.run(reference.expert_mlp), got.run(kernel.expert_mlp), allowed)


@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16")], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_dtype
@each_kernel
def test_scales_in_16_bit_as_earlier_versions_had_them(tiers, shape, dtype, kernel):
    got = case(tiers, dtype, shape, scale_bits=16)
    assert_close(f"{tiers} {shape}", naive(got).to(dtype), got.run(kernel.expert_mlp), 2 * TOLERANCE[dtype])


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
    monkeypatch.setattr(decoded, "DECODED_WEIGHTS", experts_at_once * GATED.num_weights)
    assert_close(f"{experts_at_once} at once", in_one_group, got.run(torch_path.expert_mlp), 0)


@each_kernel
def test_the_norm_behind_an_expert_comes_before_its_routing_weight(kernel):
    got = case(("int4",), torch.float32, post_norm=partial(F.rms_norm, normalized_shape=(GATED.hidden_size,)))
    assert_close("post norm", naive(got), got.run(kernel.expert_mlp), TOLERANCE[torch.float32])


GRADIENTS = {"in groups": gradients.expert_gradients, "cpu": cpu.expert_gradients}
each_gradient = pytest.mark.parametrize("gradients_of", GRADIENTS.values(), ids=GRADIENTS)


def assert_gradients_of_the_reference(
    got: Case, gradients_of: Callable[..., tuple[Tensor, Tensor]], longer: float = 1.0
) -> None:
    """That they are as near as `TOLERANCE` allows, for sums that are `longer` than those of SHAPES."""
    rows, weights = (tensor.clone().requires_grad_() for tensor in (got.hidden_states, got.top_k_weights))
    output = reference.expert_mlp(rows, got.top_k_index, weights, got.layer, got.upgrades)
    # It leans towards the output, so that the weights' gradients are no small differences of large sums.
    grad = torch.randn_like(output) + output.detach() / output.detach().square().mean().sqrt().clamp_min(1e-6)
    expected = torch.autograd.grad(output, (rows, weights), grad)
    found = gradients_of(grad, got.hidden_states, got.top_k_index, got.top_k_weights, got.layer, got.upgrades)
    for name, truth, result in zip(("rows", "weights"), expected, found, strict=True):
        assert_close(name, truth, result, TOLERANCE[truth.dtype] * longer**0.5)


def with_foreign_ids() -> Tensor:
    index = distinct_choices(21, 3)
    index[0, 1], index[3, 0] = -1, EXPERTS
    return index


@each_gradient
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tiers", TIER_CHOICES, ids="+".join)
def test_gradients_are_those_of_the_reference(tiers, shape, gradients_of):
    assert_gradients_of_the_reference(case(tiers, torch.float32, shape, with_foreign_ids()), gradients_of)


@each_gradient
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16")], ids="+".join)
def test_gradients_in_16_bits_are_those_of_the_reference(tiers, dtype, gradients_of):
    assert_gradients_of_the_reference(case(tiers, dtype, GATED, with_foreign_ids()), gradients_of)


@each_gradient
def test_gradients_with_a_norm_behind_the_experts_and_where_none_is_here(gradients_of):
    normed = case(
        ("int4", "int8"), torch.float32, post_norm=partial(F.layer_norm, normalized_shape=(GATED.hidden_size,))
    )
    assert_gradients_of_the_reference(normed, gradients_of)
    elsewhere = torch.full((4, 2), EXPERTS)
    got = case(("int4", "int8"), torch.float32, top_k_index=elsewhere)
    grads = gradients_of(got.hidden_states, got.hidden_states, elsewhere, got.top_k_weights, got.layer, got.upgrades)
    assert not any(grad.any() for grad in grads)


@each_gradient
def test_gradients_through_scales_in_16_bit(gradients_of):
    got = case(("int2", "int4"), torch.float32, top_k_index=with_foreign_ids(), scale_bits=16)
    assert_gradients_of_the_reference(got, gradients_of)


@pytest.mark.parametrize("experts_at_once", [1, 3])
def test_the_number_of_experts_that_are_decoded_together_changes_no_gradient(experts_at_once, monkeypatch):
    monkeypatch.setattr(decoded, "DECODED_WEIGHTS", experts_at_once * GATED.num_weights)
    assert_gradients_of_the_reference(case(("int2", "int8"), torch.float32), gradients.expert_gradients)


@pytest.mark.parametrize("sizes", [(512, 384), (384, 256), (1408, 128)], ids=str)
@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "int8"), ("int4", "fp16")], ids="+".join)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_gradients_through_blocks_of_every_width(tiers, sizes, num_tokens):
    hidden, intermediate = sizes
    shape = ExpertShape(hidden, intermediate, 2 * intermediate, has_bias=False, transposed=False)
    index = distinct_choices(num_tokens, 3)
    got = case(tiers, torch.float32, shape, index)
    assert_gradients_of_the_reference(got, cpu.expert_gradients, longer=shape.up_rows / GATED.up_rows)


def test_gradients_do_not_depend_on_the_default_dtype():
    got = case(("int4", "int8"))
    arguments = got.hidden_states, got.hidden_states, got.top_k_index, got.top_k_weights, got.layer, got.upgrades
    expected = cpu.expert_gradients(*arguments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = cpu.expert_gradients(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
