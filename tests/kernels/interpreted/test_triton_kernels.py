"""The Triton kernels, interpreted on a CPU, against the reference: every pair, tile and layout, on ugly shapes.

The interpreter runs the kernels' own code one program after the other. It says nothing of speed, and cuts bfloat16 off
where a GPU rounds; so float16 is the tight test, and bfloat16 a loose one.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import EXPERTS, GATED, SHAPES, case_by_rows, distinct_choices, naive, named
from numerics import assert_close
from regimes import each_regime
from tiny import logits, prompt, tiny_qwen3_moe
from torch import Tensor
from torch.nn import functional as F

import dynaexq
import dynaexq.kernels.triton
from dynaexq import kernels
from dynaexq.kernels import PlainExchange, dispatch, reference
from dynaexq.kernels.triton import TritonExchange, add_routing, expert_mlp, routing
from dynaexq.kernels.triton.preparation import Sums, prepare
from dynaexq.kernels.triton.reductions import group_sums, weighted_sum
from dynaexq.memory import RoutingCounter
from dynaexq.types import ALL_TIERS, MASS_UNIT, WORDS_AHEAD, ExpertShape

WIDE = ExpertShape(hidden_size=256, intermediate_size=128, up_rows=256, has_bias=False, transposed=False)
"""Blocks of 256 and of 128 codes; GATED has blocks of 64, and a padded one."""

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2e-2}
MOST_PLANES = [
    ("int2", "int3"),
    ("int2", "int4"),
    ("int2", "int8"),
    ("int3", "int4"),
    ("int4", "int6"),
    ("int4", "int8"),
    ("int6", "fp16"),
    ("int8", "fp16"),
]
"""Pairs in which every plane is read from every place it may have."""

each_pair = pytest.mark.parametrize("tiers", ALL_TIERS, ids="+".join)


@pytest.fixture(autouse=True)
def _poison():
    """Fill every tensor that torch leaves uninitialized, with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(name: str, got) -> None:
    got = named(got)
    assert_close(name, got.run(reference.expert_mlp), got.run(expert_mlp), TOLERANCE[got.hidden_states.dtype])


@each_pair
@pytest.mark.parametrize("regime", ["few", "many"], indirect=True)
def test_every_ladder_for_few_and_for_many_pairs(tiers, regime):
    compare(f"{tiers} {regime}", case_by_rows(tiers, torch.float16, GATED, distinct_choices(3, 2)))


@pytest.mark.parametrize("tiers", MOST_PLANES, ids="+".join)
def test_ladders_in_blocks_of_256_and_128_codes(tiers):
    """And for a single token or two, whose tiles are the smallest."""
    compare(f"{tiers}", case_by_rows(tiers, torch.float16, WIDE, distinct_choices(2, 2)))


@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16")], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("regime", ["few", "many"], indirect=True)
def test_every_kind_of_expert(tiers, shape, regime):
    compare(f"{tiers} {shape} {regime}", case_by_rows(tiers, torch.float16, shape, distinct_choices(3, 2)))


@pytest.mark.parametrize(
    ("tiers", "regime"),
    [(("int2", "int8"), "single"), (("int2", "int8"), "few"), (("int4",), "single"), (("int4", "int6"), "few")],
    ids=["int2+int8 single", "int2+int8 few", "int4 single", "int4+int6 few"],
    indirect=["regime"],
)
@pytest.mark.parametrize("group_size", [32, 128])
def test_every_group_size(tiers, group_size, regime):
    """Half a slice of codes is a group of 32; half a tile of gate and up is less than a group of 128."""
    got = case_by_rows(tiers, torch.float16, WIDE, distinct_choices(1, 3), group_size=group_size)
    compare(f"{tiers} {group_size} {regime}", got)


@pytest.mark.parametrize("tiers", MOST_PLANES, ids="+".join)
@pytest.mark.parametrize("regime", ["few", "many"], indirect=True)
def test_scales_in_16_bit_as_earlier_versions_had_them(tiers, regime):
    got = case_by_rows(tiers, torch.float16, GATED, distinct_choices(3, 2), scale_bits=16)
    compare(f"{tiers} {regime}", got)


@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "int8"), ("fp16",)], ids="+".join)
@each_regime
def test_bfloat16(tiers, regime):
    compare(f"{tiers} {regime}", case_by_rows(tiers, torch.bfloat16, GATED, distinct_choices(3, 2)))


@pytest.mark.parametrize(
    "top_k_index",
    [
        pytest.param(torch.tensor([[5, 2]]), id="one token"),
        pytest.param(torch.full((19, 1), 3), id="all tokens on one expert"),
        pytest.param(torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [EXPERTS, 7], [1, 0]]), id="ids of other ranks"),
        pytest.param(torch.tensor([[-1, 3], [3, -1], [-1, -1]]), id="negative ids"),
        pytest.param(torch.full((4, 2), EXPERTS), id="no token routed here"),
        pytest.param(torch.arange(33, dtype=torch.int32).view(11, 3) % EXPERTS, id="int32 ids"),
        pytest.param(torch.arange(EXPERTS).flip(0)[None], id="one token, all experts"),
        pytest.param(torch.empty(0, 2, dtype=torch.int64), id="no tokens"),
    ],
)
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "sorted"])
def test_any_routing(top_k_index, counted, monkeypatch):
    monkeypatch.setattr(routing, "COUNTED_PAIRS", 2048 if counted else 0)
    compare("routing", case_by_rows(("int4", "fp16"), torch.float16, GATED, top_k_index))


@pytest.mark.parametrize(
    ("shape", "activation", "name"),
    [
        pytest.param(GATED, lambda rows: F.silu(rows[:, ::2]) * rows[:, 1::2], None, id="gate without a name"),
        pytest.param(GATED, lambda rows: F.gelu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1], "gelu", id="gelu"),
        pytest.param(SHAPES["no gate"], F.silu, "silu", id="silu without a gate"),
    ],
)
@pytest.mark.parametrize("regime", ["few", "many"], indirect=True)
def test_only_silu_with_a_gate_is_computed_in_the_kernel(shape, activation, name, regime):
    got = case_by_rows(("int2", "int4"), torch.float16, shape, distinct_choices(3, 2))
    got = replace(got, layer=replace(got.layer, activation=activation, activation_name=name))
    assert_close(f"{name}", got.run(reference.expert_mlp), got.run(expert_mlp), TOLERANCE[torch.float16])


def test_views_that_are_not_contiguous():
    got = case_by_rows(("int4",), torch.float16, GATED, distinct_choices(2, 3).T.contiguous().T)
    assert not got.top_k_index.is_contiguous()
    compare("strides", got)


def test_the_norm_behind_an_expert_comes_before_its_routing_weight():
    norm = partial(F.rms_norm, normalized_shape=(GATED.hidden_size,))
    got = case_by_rows(("int4",), torch.float16, GATED, distinct_choices(2, 2), post_norm=norm)
    assert_close("post norm", naive(got).half(), got.run(expert_mlp), TOLERANCE[torch.float16])


def test_the_same_bits_every_time():
    got = named(case_by_rows(("int2", "int4"), torch.float16, GATED, distinct_choices(5, 3)))
    assert torch.equal(got.run(expert_mlp), got.run(expert_mlp))


def blocks_of(ids: Tensor, block_m: int, num_experts: int) -> list[tuple[int, list[int]]]:
    """(expert, pairs) of every block that `prepare` lists."""
    (order, blocks), _ = prepare(ids, torch.ones(ids.shape), num_experts, block_m)
    assert order.dtype == blocks.dtype == torch.int32
    return [(e, order[first : first + n].tolist()) for e, first, n in blocks.T.tolist() if e >= 0]


@pytest.mark.parametrize(("tokens", "num_experts", "block_m"), [(1, 8, 16), (9, 40, 16), (100, 4, 16), (70, 3, 64)])
def test_the_kernel_finds_the_blocks_of_its_twin_in_torch(tokens, num_experts, block_m):
    ids = torch.randint(-1, num_experts + 2, (tokens, 3))
    order, blocks = routing.route_torch(ids, num_experts, block_m)
    twin = [(e, order[first : first + n].tolist()) for e, first, n in blocks.T.tolist() if e >= 0]
    assert sorted(blocks_of(ids, block_m, num_experts)) == sorted(twin)


@pytest.mark.parametrize(("tokens", "num_experts", "block_m"), [(1, 8, 16), (9, 40, 16), (100, 4, 16), (70, 3, 64)])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "sorted"])
def test_every_pair_is_in_one_block_of_its_expert(tokens, num_experts, block_m, counted, monkeypatch):
    monkeypatch.setattr(routing, "COUNTED_PAIRS", 2048 if counted else 0)
    ids = torch.randint(-1, num_experts + 2, (tokens, 3))
    expected = {
        expert: (ids.flatten() == expert).nonzero().flatten().tolist()
        for expert in ids.unique().tolist()
        if 0 <= expert < num_experts
    }
    found: dict[int, list[int]] = {}
    for expert, pairs in sorted(blocks_of(ids, block_m, num_experts), key=lambda block: block[1]):
        assert len(pairs) == min(block_m, len(expected[expert]) - len(found.get(expert, []))), (
            "only a last one is short"
        )
        found[expert] = found.get(expert, []) + pairs
    assert found == expected


def test_results_of_foreign_ids_are_not_read():
    index = torch.tensor([[1, EXPERTS], [-1, 2]])
    results, weights = torch.randn(4, 70), torch.rand(2, 2)
    results[1:3] = float("nan")
    got = weighted_sum(results, index, weights, EXPERTS)
    expected = torch.stack([results[0] * weights[0, 0], results[3] * weights[1, 1]])
    assert_close("sum", expected, got, 1e-6)


def test_sums_over_groups_leave_padding_out():
    rows = torch.randn(3, 70)
    padded = F.pad(rows, (0, 58))
    assert_close("sums", padded.view(3, 4, 32).sum(2), group_sums(rows, 128, 32), 1e-6)


@pytest.mark.parametrize("counted", [True, False], ids=["one launch", "many pairs"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_one_launch_prepares_what_three_would(tokens, counted, monkeypatch):
    monkeypatch.setattr(routing, "COUNTED_PAIRS", 2048 if counted else 0)
    ids, weights = torch.randint(-1, EXPERTS + 2, (tokens, 3)), torch.rand(tokens, 3).half()
    rows = torch.randn(tokens, 700).half()
    expected, got = (RoutingCounter(1, EXPERTS, torch.device("cpu")) for _ in range(2))
    expected.observe(0, ids, weights)
    found, sums = prepare(ids, weights, EXPERTS, 16, Sums(rows, 704, 32), got.row(0, 3))
    alone, none = prepare(ids, weights, EXPERTS, 16)
    assert none is None
    assert torch.equal(found.order, alone.order)
    assert torch.equal(*(blocks[:, blocks[0] >= 0] for blocks in (found.blocks, alone.blocks)))
    assert torch.equal(sums, group_sums(rows, 704, 32))
    assert torch.equal(got.sums, expected.sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_routing_is_counted_to_the_last_unit(dtype):
    ids = torch.randint(-1, EXPERTS + 2, (70, 3))
    weights = (torch.rand(70, 3) * 10.0 ** torch.randint(-7, 4, (70, 3))).to(dtype)
    weights[:4] = torch.tensor([float("nan"), float("inf"), -1.0])
    weights[4] = torch.tensor([0.5, 1.5, 2.5]) / MASS_UNIT  # halves
    expected, got = (RoutingCounter(2, EXPERTS, torch.device("cpu")) for _ in range(2))
    for counter in (expected, got):
        counter.sums += torch.arange(EXPERTS + 2) * 2**40
    for _ in range(2):
        expected.observe(1, ids, weights)
        add_routing(got.row(1, ids.shape[-1]), ids, weights)
    assert torch.equal(got.sums, expected.sums)


def test_a_forward_counts_its_routing_where_it_is_asked_to():
    got = named(case_by_rows(("int4",), torch.float16, GATED, torch.tensor([[0, EXPERTS], [-1, 3]])))
    counter = RoutingCounter(1, EXPERTS, torch.device("cpu"))
    counter.observe(0, got.top_k_index, got.top_k_weights)
    counts = torch.zeros(EXPERTS + 2, dtype=torch.int64)
    assert torch.equal(got.run(expert_mlp), got.run(partial(expert_mlp, counts=counts)))
    assert torch.equal(counts, counter.row(0, 1))


def test_no_tokens_count_nothing():
    counts = torch.zeros(EXPERTS + 2, dtype=torch.int64)
    got = case_by_rows(("int4",), torch.float16, GATED, torch.empty(0, 2, dtype=torch.int64))
    got.run(partial(expert_mlp, counts=counts))
    assert not counts.any()


def test_a_patched_model_with_all_of_its_upgrades_and_with_none(monkeypatch):
    """Through table, fence, operator and counter."""
    ids = prompt(batch=1, length=2)
    model = tiny_qwen3_moe(torch.float16)
    monkeypatch.setattr(dispatch, "_backend", lambda *_: kernels.triton)
    runtime = dynaexq.patch(model, hbm_budget="1GB", device="cpu", tiers=("int2", "int4"))
    for budget in ("1GB", runtime.memory()["total"] - runtime.memory()["upgrade"]):
        runtime.set_budget(budget)
        monkeypatch.setattr(dispatch, "_backend", lambda *_: kernels.reference)
        expected, before = logits(model, ids), runtime.routed_mass()
        monkeypatch.setattr(dispatch, "_backend", lambda *_: kernels.triton)
        assert_close(f"logits within {budget}", expected, logits(model, ids), 5 * TOLERANCE[torch.float16])
        assert (runtime.routed_mass() - before).sum() == pytest.approx(ids.numel() * len(before), rel=1e-3)


@pytest.mark.slow
@each_pair
@each_regime
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE], ids=[*SHAPES, "wide"])
def test_everything_at_once(tiers, regime, dtype, shape):
    compare(f"{tiers} {regime} {dtype} {shape}", case_by_rows(tiers, dtype, shape, distinct_choices(11, 3)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (2, 128)], ids=str)
def test_words_are_exchanged_as_plainly(shape):
    layers, experts = shape
    start = torch.randint(0, 2**62, (WORDS_AHEAD + layers * (2 * experts + 2),))
    sums = torch.randint(0, 2**62, (layers, experts + 2))

    def exchanged(exchange: PlainExchange) -> list[Tensor]:
        words, entries = start.clone(), torch.zeros(layers, experts, dtype=torch.int64)
        for steps in (1, 0):
            exchange.fetch(words, entries)
            exchange.report(words, sums, steps)
        return [words, entries]

    for got, expected in zip(exchanged(TritonExchange()), exchanged(PlainExchange()), strict=True):
        assert torch.equal(got, expected)
