"""What few tokens pass in a decoder layer: every instruction set gives what its own products give step by step."""

import pytest
import torch
from decoder_cases import CACHED, OPTIONS, SHAPE, TOP_K, Options, decoder_cache, decoder_case, decoder_inputs
from kernel_cases import EXPERTS
from numerics import assert_close
from torch import Tensor

from dynaexq.errors import InputError
from dynaexq.kernels import Step
from dynaexq.kernels.cpu import build
from dynaexq.kernels.cpu.native_decoder import NativeAttention
from dynaexq.memory import RoutingCounter

AVAILABLE = [target for target in build.INSTRUCTION_SETS if build.cpu_features().issuperset(target.features)]
ROUNDING = 2**-8
SIZES = [(1, 1, False), (2, 3, False), (3, 1, True), (2, 2, True)]
"""Batch, length, and whether rows are at positions of their own."""

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs AVX2 on Linux")


@pytest.fixture(params=AVAILABLE, ids=lambda target: target.name)
def library(request: pytest.FixtureRequest) -> build.Library:
    try:
        return build.open_library(build.compiled(request.param))
    except build.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_before_attention_has_the_bits_of_its_steps(library: build.Library, options: Options) -> None:
    case = decoder_case(library, options)
    for size in SIZES:
        rows, cosine, sine, _ = decoder_inputs(*size)
        expected, got = case.before(rows, cosine, sine), case.native.before_attention(rows, cosine, sine)
        for name, one, other in zip(("query", "key", "value"), expected, got, strict=True):
            assert_close(f"{name} {size}", one, other, 0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_after_attention_differs_by_a_rounding_of_the_weights(library: build.Library, options: Options) -> None:
    case = decoder_case(library, options)
    entries = case.experts.upgrades.entries
    for size in SIZES:
        rows, _, _, attended = decoder_inputs(*size)
        expected, _ = case.after(attended, rows, entries)
        assert_close(str(size), expected, case.native.after_attention(attended, rows, entries, None), ROUNDING)


def test_the_routing_is_counted_as_the_counter_does(library: build.Library) -> None:
    case = decoder_case(library, OPTIONS[0])
    rows, _, _, attended = decoder_inputs(4, 2)
    entries = case.experts.upgrades.entries
    _, ids = case.after(attended, rows, entries)
    counter = RoutingCounter(1, EXPERTS, torch.device("cpu"))
    case.native.after_attention(attended, rows, entries, counter.row(0, TOP_K))
    assert int(counter.sums[0, -1]) == 8
    assert counter.totals()[0].nonzero()[0].tolist() == sorted(set(ids.flatten().tolist()))
    assert counter.totals().sum() == pytest.approx(8, rel=0.01), "normalized weights"


def test_of_equal_probabilities_pytorchs_are_chosen(library: build.Library) -> None:
    case = decoder_case(library, OPTIONS[0])
    rows, _, _, attended = decoder_inputs(8, 1)
    case.router.zero_()
    case.router[:, 0] = torch.arange(EXPERTS) // 3  # of three and three experts the probabilities are equal
    entries = case.experts.upgrades.entries
    for row, of_row in zip(rows[:, None], attended[:, None], strict=True):
        _, ids = case.after(of_row, row, entries)
        counter = RoutingCounter(1, EXPERTS, torch.device("cpu"))
        case.native.after_attention(of_row, row, entries, counter.row(0, TOP_K))
        assert counter.totals()[0].nonzero()[0].tolist() == sorted(ids.flatten().tolist())


def test_logits_that_are_no_numbers_choose_experts_that_there_are(library: build.Library) -> None:
    case = decoder_case(library, OPTIONS[0])
    rows, _, _, attended = decoder_inputs(1, 1)
    counter = RoutingCounter(1, EXPERTS, torch.device("cpu"))
    output = case.native.after_attention(
        attended * torch.nan, rows, case.experts.upgrades.entries, counter.row(0, TOP_K)
    )
    assert output.isnan().all()
    assert int(counter.sums[0, EXPERTS]) == 0, "none of them foreign"


def test_words_of_another_layer_are_refused(library: build.Library) -> None:
    case = decoder_case(library, OPTIONS[0])
    rows, _, _, attended = decoder_inputs(1, 1)
    entries = case.experts.upgrades.entries
    for words in ((entries[:-1], None), (entries, torch.zeros(EXPERTS, dtype=torch.int64)), (entries.int(), None)):
        with pytest.raises(InputError, match="expected int64"):
            case.native.after_attention(attended, rows, *words)
    assert case.native.after_attention(attended, rows, entries, None).shape == (1, 1, SHAPE.hidden_size)


def test_strided_angles_are_read_as_they_are_meant(library: build.Library) -> None:
    case = decoder_case(library, OPTIONS[0])
    rows, cosine, sine, _ = decoder_inputs(1, 2)

    def strided(angles: Tensor) -> Tensor:
        return angles.repeat_interleave(2, -1)[..., ::2]

    expected = case.before(rows, cosine, sine)
    for one, other in zip(expected, case.native.before_attention(rows, strided(cosine), strided(sine)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mask", ["none", "truths"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers_in_one_call_are_those_of_two_and_attention(
    library: build.Library, options: Options, mask: str
) -> None:
    case = decoder_case(library, options)
    for batch, length, per_row in SIZES:
        if mask == "none" and length > 1:
            continue
        rows, cosine, sine, _ = decoder_inputs(batch, length, per_row)
        layers = [decoder_cache(batch, length) for _ in range(2)]
        seen = None if mask == "none" else torch.rand(batch, 1, length, CACHED + length) < 0.8
        published = case.experts.upgrades.entries, torch.zeros(EXPERTS + 2, dtype=torch.int64)
        expected, wanted = rows, [cache.clone() for cache in layers]
        for cache in wanted:
            query, key, value = case.native.before_attention(expected, cosine, sine)
            cache[0, :, :, CACHED:], cache[1, :, :, CACHED:] = key, value
            attended = NativeAttention(library.attend, 64)(query, *cache, seen, 0.3)
            expected = case.native.after_attention(attended, expected, *published)
        counted = published[1].clone()
        published[1].zero_()
        steps, given = [], rows
        for cache in layers:
            assert case.native.attends(given, *cache[:, :, :, :CACHED], seen)
            output = torch.empty_like(given)
            steps.append(case.native.step(Step(given, output, cosine, sine, *cache, seen, 0.3)))
            given = output
        case.native.run(steps, [published] * 2)
        assert torch.equal(given, expected), (batch, length)
        assert all(map(torch.equal, layers, wanted)), "keys and values"
        assert torch.equal(published[1], counted)


def test_rows_that_attention_would_not_take_are_left_to_the_model(library: build.Library) -> None:
    case = decoder_case(library, OPTIONS[0])
    rows, _, _, _ = decoder_inputs(2, 1)
    key, value = decoder_cache(2, 0)
    assert case.native.attends(rows, key, value, None)
    assert case.native.attends(rows, key, value, torch.ones(2, 1, 1, CACHED + 1, dtype=torch.bool))
    assert not case.native.attends(rows, key, value, torch.ones(2, 1, 1, CACHED, dtype=torch.bool)), "of too few keys"
    assert not case.native.attends(rows, key.float(), value, None)
    assert not case.native.attends(rows, key[:, :1], value[:, :1], None), "of another model"
    assert not case.native.attends(rows[:1], key, value, None), "of another batch"
