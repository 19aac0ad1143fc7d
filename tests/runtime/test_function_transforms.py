"""`torch.func` over a patched model gives what it gives over the plain one."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import dynaexq


def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda states: model(inputs_embeds=states).logits.sin().sum()


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "grad": lambda function, states: torch.func.grad(function)(states),
    "vjp": lambda function, states: torch.func.vjp(function, states)[1](torch.tensor(1.0))[0],
    "jacrev": lambda function, states: torch.func.jacrev(function)(states),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention, under jacrev
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tiers", [("fp16",), ("int4", "fp16"), ("int8",)], ids="-".join)
def test_a_transform_sees_through_the_experts(transform: str, tiers: tuple[str, ...]) -> None:
    plain, model = tiny.tiny_qwen3_moe(torch.float32), tiny.tiny_qwen3_moe(torch.float32)
    plain.set_experts_implementation("eager")
    dynaexq.patch(model, "1GiB", tiers=tiers)
    states = plain.get_input_embeddings()(tiny.prompt()).detach()
    found = TRANSFORMS[transform](loss(model), states)
    if tiers[-1] == "fp16":
        torch.testing.assert_close(found, TRANSFORMS[transform](loss(plain), states), rtol=1e-4, atol=1e-4)
    by_autograd = states.clone().requires_grad_()
    loss(model)(by_autograd).backward()
    torch.testing.assert_close(found, by_autograd.grad, rtol=1e-4, atol=1e-4)
