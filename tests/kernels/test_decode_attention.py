"""Attention of few queries: every instruction set follows the formula, and what it does not take it refuses."""

from types import SimpleNamespace

import attention_cases
import pytest
import torch
from attention_cases import MASKS, SHAPES, Shape
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from dynaexq.kernels import attention
from dynaexq.kernels.cpu import build, interface
from dynaexq.kernels.cpu.native_decoder import NativeAttention

AVAILABLE = [target for target in build.INSTRUCTION_SETS if build.cpu_features().issuperset(target.features)]
MOST_ROWS = 64
ROUNDING = 2**-8

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs AVX2 on Linux")


@pytest.fixture(params=AVAILABLE, ids=lambda target: target.name)
def run(request: pytest.FixtureRequest) -> NativeAttention:
    try:
        return NativeAttention(build.open_library(build.compiled(request.param)).attend, MOST_ROWS)
    except build.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("mask", MASKS)
def test_every_instruction_set_follows_the_formula(run: NativeAttention, mask: str) -> None:
    for shape in SHAPES:
        tensors = attention_cases.tensors(shape, mask)
        assert run.takes(*tensors)
        expected, got = attention(*tensors, 0.2), run(*tensors, 0.2)
        assert_close(f"{shape}", expected, got, ROUNDING)


def test_the_formula_is_pytorchs() -> None:
    for shape in SHAPES:
        for kind in MASKS:
            query, key, value, mask = (t if t is None else t.double() for t in attention_cases.tensors(shape, kind))
            mask = mask if mask is None else (mask.bool() if kind == "truths" else mask.float())
            query, key, value = query.float(), key.float(), value.float()
            expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.2, enable_gqa=True)
            assert_close(f"{shape} {kind}", expected.transpose(1, 2), attention(query, key, value, mask, 0.2), 1e-5)


def test_a_query_that_sees_no_key_gets_zeros(run: NativeAttention) -> None:
    query, key, value, _ = attention_cases.tensors(SHAPES[1], "none")
    for mask in (torch.zeros(1, 1, 1, 67, dtype=torch.bool), torch.full((2, 1, 3, 67), -torch.inf)):
        assert torch.equal(run(query, key, value, mask, 1.0), torch.zeros(2, 3, 6, 96).bfloat16())
    lowest = torch.full((1, 1, 1, 67), torch.finfo(torch.bfloat16).min).bfloat16()  # sees all of them alike
    assert_close("lowest", attention(query, key, value, lowest, 1.0), run(query, key, value, lowest, 1.0), ROUNDING)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_may_be_the_same_for_heads_rows_and_queries(run: NativeAttention, mask: str) -> None:
    query, key, value, whole = attention_cases.tensors(SHAPES[4], mask)
    for narrow in (whole,) if whole is None else (whole[:1], whole[:, :1], whole[:, :, :1], whole[:1, :1, :1]):
        assert run.takes(query, key, value, narrow)
        got = run(query, key, value, narrow, 0.2)
        assert_close(mask, attention(query, key, value, narrow, 0.2), got, ROUNDING)


def test_keys_that_no_query_sees_are_not_even_read(run: NativeAttention) -> None:
    query, key, value, _ = attention_cases.tensors(SHAPES[5], "none")
    seen = torch.arange(1025)[None, None, None] < 100
    expected = run(query, key[:, :, :100], value[:, :, :100], None, 0.2)
    key[:, :, 128:], value[:, :, 128:] = torch.nan, torch.nan  # as what a static cache has not got yet may be
    assert torch.equal(run(query, key, value, seen, 0.2), expected)


def test_tensors_are_read_where_they_lie(run: NativeAttention) -> None:
    shape = Shape(2, 6, 2, 3, 67, 32, 96)
    query, key, value, mask = attention_cases.tensors(shape, "float32")
    expected = run(query, key, value, mask, 0.2)
    longer = [torch.cat([t, t], 2)[:, :, : shape.keys] for t in (key, value)]  # a cache with room
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query.contiguous(), *longer)]
    backwards = mask.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(run(query, *longer, mask, 0.2), expected)
    assert torch.equal(run(*strided, backwards, 0.2), expected)


def test_the_number_of_threads_changes_nothing(run: NativeAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, outputs, waited = attention_cases.tensors(SHAPES[5], "bfloat16"), [], []
    for size in (1, 2, 5):
        team = SimpleNamespace(size=size, observe=lambda *seconds: waited.append(seconds))
        monkeypatch.setattr(interface, "team", team)
        outputs.append(run(*tensors, 0.2))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert waited, "it was too small for a second thread"


def test_what_is_not_a_number_stays_seen(run: NativeAttention) -> None:
    query, key, value, _ = attention_cases.tensors(SHAPES[3], "none")
    key[0, 0, 5, 3] = torch.nan
    output = run(query, key, value, None, 0.2)
    assert output[..., :7, :].isnan().all()
    assert output[..., 7:, :].isfinite().all()


def other(**changed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value, mask = attention_cases.tensors(SHAPES[3], "truths")
    return tuple(({"query": query, "key": key, "value": value, "mask": mask} | changed).values())  # type: ignore[return-value]


@pytest.mark.parametrize(
    "tensors",
    [
        other(query=torch.randn(1, 14, 2, 64)),
        other(key=torch.randn(1, 2, 130, 64).half()),
        other(key=torch.randn(1, 2, 130, 32).bfloat16()),
        other(key=torch.randn(1, 2, 129, 64).bfloat16()),
        other(key=torch.randn(2, 2, 130, 64).bfloat16()),
        other(value=torch.randn(1, 2, 130, 40).bfloat16()),
        other(value=torch.randn(1, 2, 64, 130).bfloat16().transpose(2, 3)),
        other(value=torch.empty(1, 2, 130, 64, device="meta").bfloat16()),
        other(query=torch.randn(1, 13, 2, 64).bfloat16()),
        other(query=torch.randn(1, 14, 11, 64).bfloat16(), mask=None),
        other(query=torch.randn(1, 14, 0, 64).bfloat16(), mask=None),
        other(mask=torch.zeros(1, 14, 2, 130).double()),
        other(mask=torch.zeros(1, 14, 2, 131)),
        other(mask=torch.zeros(2, 130)),
    ],
)
def test_what_it_does_not_take_it_refuses(tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    assert not NativeAttention(lambda *_: 0, MOST_ROWS).takes(*tensors)


def test_memory_that_runs_out_is_an_error() -> None:
    with pytest.raises(MemoryError, match="attention over 130 tokens"):
        NativeAttention(lambda *_: 1, MOST_ROWS)(*other(), 0.2)
