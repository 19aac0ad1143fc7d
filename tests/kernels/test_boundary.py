"""Tensors that do not belong together are refused before a kernel sees an address, wherever they come in."""

import pytest
import tiny
import torch
from shifting import patched
from torch import Tensor, nn

from dynaexq.errors import InputError
from dynaexq.kernels.cpu.native import NativeLayer
from dynaexq.runtime.experts import MixedPrecisionExperts

N, H, K = 4, 64, 2


def inputs(rows=(N, H), ids=(N, K), weights=(N, K), id_dtype=torch.int64, dtype=torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(rows).to(dtype), torch.zeros(ids, dtype=id_dtype), torch.rand(weights)


BAD = {
    "rows too narrow": inputs(rows=(N, 32)),
    "rows too wide": inputs(rows=(N, 128)),
    "more ids than rows": inputs(ids=(5000, K), weights=(5000, K)),
    "fewer ids than rows": inputs(rows=(40, H)),
    "one dimension of ids": inputs(ids=(N,), weights=(N,)),
    "three dimensions of rows": inputs(rows=(2, 2, H)),
    "fewer weights than ids": inputs(weights=(N, 1)),
    "whole rows": inputs(dtype=torch.int64),
    "ids that are none": inputs(id_dtype=torch.float32),
    "ids on another device": (*inputs()[:1], torch.zeros(N, K, dtype=torch.int64, device="meta"), inputs()[2]),
}


@pytest.fixture(scope="module")
def experts() -> MixedPrecisionExperts:
    model: nn.Module = patched(("int4", "int8"))
    experts = tiny.sparse_blocks(model)[0].experts
    experts.model = [model]  # which must outlive it
    return experts


@pytest.mark.parametrize("given", BAD.values(), ids=BAD)
def test_the_operator_refuses(given: tuple[Tensor, ...], experts: MixedPrecisionExperts) -> None:
    if any(t.is_meta for t in given):
        with pytest.raises(InputError, match="move the inputs there"):
            experts.compute(*given)
        return
    with pytest.raises(InputError, match="expected"):
        experts(*given)
    assert experts(*inputs()).shape == (N, H), "and goes on"


@pytest.mark.parametrize("shape", [(N, 32), (N + 1, H), (N * H,)])
def test_the_backward_refuses_a_gradient_of_another_shape(shape, experts: MixedPrecisionExperts) -> None:
    with pytest.raises(InputError, match=r"expected a gradient like the output, \[4, 64\]"):
        experts.gradients(torch.randn(shape), *inputs())


@pytest.mark.parametrize(
    "rows",
    [torch.randn(H, N).T, torch.randn(2 * N, H)[::2], torch.randn(N, 2 * H)[:, ::2]],
    ids=["T", "rows", "columns"],
)
def test_rows_that_do_not_lie_in_a_row_are_the_same_rows(rows: Tensor, experts: MixedPrecisionExperts) -> None:
    _, ids, weights = inputs()
    assert torch.equal(experts(rows, ids, weights), experts(rows.contiguous(), ids, weights))


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros(7, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int32),
        torch.zeros(16, dtype=torch.int64)[::2],
        torch.zeros(8, dtype=torch.int64, device="meta"),
    ],
)
def test_the_kernel_refuses_words_that_are_not_its_own(words: Tensor, experts: MixedPrecisionExperts) -> None:
    layer = experts._layer
    native = layer.prepared.get(("cpu", torch.float32))
    if native is None:
        experts(*inputs())
        native = layer.prepared[("cpu", torch.float32)]
    if native is None:
        pytest.skip("no native kernel here")
    assert isinstance(native, NativeLayer)
    with pytest.raises(InputError, match=r"expected int64 \[8\] in a row on the CPU"):
        native(*inputs(), words)
    with pytest.raises(InputError, match=r"expected int64 \[10\]"):
        native(*inputs(), torch.zeros(8, dtype=torch.int64), words)
