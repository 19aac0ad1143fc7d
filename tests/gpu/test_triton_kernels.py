"""The Triton kernels on a real GPU: right, without a wait for the host, and the same under a captured graph."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from kernel_cases import EXPERTS, GATED, SHAPES, Case, case_by_rows, distinct_choices, named
from numerics import assert_close
from regimes import each_regime
from torch.nn import functional as F

from dynaexq.kernels import Upgrades, dispatch, reference
from dynaexq.memory import RoutingCounter, allocate_bytes
from dynaexq.planning.budget import TIER_CHOICES
from dynaexq.types import ExpertShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

DEVICE = torch.device("cuda", 0)
WIDE = ExpertShape(hidden_size=512, intermediate_size=384, up_rows=768, has_bias=False, transposed=False)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}  # here bfloat16 is rounded, not cut off

each_pair = pytest.mark.parametrize("tiers", [*TIER_CHOICES, ("int2", "fp16")], ids="+".join)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float16", "bfloat16"])


@pytest.fixture(autouse=True)
def _poison():
    """Fill every tensor that torch leaves uninitialized, with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(got: Case) -> Case:
    """The same case on the GPU, with the upgrades where its table says and its activation named."""
    entries = got.upgrades.entries.clone()
    slots = {}
    for expert in entries.nonzero().flatten().tolist():
        block = got.upgrades.of(expert)
        slot = allocate_bytes(block.numel(), DEVICE).copy_(block)
        slots[slot.data_ptr()] = slot
        entries[expert] = slot.data_ptr() | int(entries[expert] & 0xFF)
    layer = replace(named(got).layer, base=got.layer.base.to(DEVICE))
    tensors = (got.hidden_states, got.top_k_index, got.top_k_weights)
    return Case(*(t.to(DEVICE) for t in tensors), layer, Upgrades(entries.to(DEVICE), slots.__getitem__))


def compare(name: str, got: Case) -> None:
    expected = got.run(reference.expert_mlp)
    found = on_gpu(got).run(dispatch.expert_mlp)
    assert_close(name, expected, found.cpu(), TOLERANCE[got.hidden_states.dtype])


def test_the_door_leads_to_triton():
    got = on_gpu(case_by_rows(("int4",), torch.bfloat16))
    assert dispatch.triton_runs(DEVICE, torch.bfloat16, torch.bfloat16)
    assert dispatch.counts_routing(got.hidden_states, got.layer)
    assert not dispatch.counts_routing(got.hidden_states.float(), got.layer)


@each_pair
@each_dtype
@each_regime
@pytest.mark.parametrize("shape", [GATED, WIDE], ids=["narrow", "wide"])
def test_every_ladder_in_every_tile(tiers, dtype, regime, shape):
    compare(f"{tiers} {dtype} {regime}", case_by_rows(tiers, dtype, shape, distinct_choices(37, 3)))


@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int4", "fp16"), ("fp16",)], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_regime
def test_every_kind_of_expert(tiers, shape, regime):
    compare(f"{tiers} {shape} {regime}", case_by_rows(tiers, torch.float16, shape))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tiers", [("int2", "int8"), ("int2", "int4")], ids="+".join)
@each_regime
def test_every_group_size(tiers, group_size, regime):
    compare(f"{tiers} {group_size}", case_by_rows(tiers, torch.float16, WIDE, group_size=group_size))


@pytest.mark.parametrize(
    "top_k_index",
    [
        pytest.param(torch.tensor([[5, 2]]), id="one token"),
        pytest.param(torch.full((99, 1), 3), id="all tokens on one expert"),
        pytest.param(torch.tensor([[0, EXPERTS], [EXPERTS, -1], [EXPERTS, 7], [1, 0]]), id="ids of other ranks"),
        pytest.param(torch.full((4, 2), EXPERTS), id="no token routed here"),
        pytest.param(torch.arange(3 * 999).view(999, 3) % EXPERTS, id="a long prompt"),
        pytest.param(torch.empty(0, 2, dtype=torch.int64), id="no tokens"),
    ],
)
def test_any_routing(top_k_index):
    compare("routing", case_by_rows(("int4", "fp16"), torch.float16, GATED, top_k_index))


def test_the_norm_behind_an_expert():
    norm = partial(F.rms_norm, normalized_shape=(GATED.hidden_size,))
    compare("post norm", case_by_rows(("int4", "int8"), torch.float16, post_norm=norm))


@pytest.mark.parametrize("tokens", [1, 40, 900])
def test_the_host_never_waits(tokens):
    got = on_gpu(case_by_rows(("int2", "int4"), torch.bfloat16, WIDE, distinct_choices(tokens, 3)))
    got.run(dispatch.expert_mlp)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got.run(dispatch.expert_mlp)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 40, 900])
def test_the_same_bits_every_time(tokens):
    got = on_gpu(case_by_rows(("int2", "int4"), torch.bfloat16, WIDE, distinct_choices(tokens, 3)))
    first = got.run(dispatch.expert_mlp)
    assert all(torch.equal(first, got.run(dispatch.expert_mlp)) for _ in range(5))


@pytest.mark.parametrize("tokens", [1, 40, 900])
@pytest.mark.parametrize("tiers", [("int2", "int4"), ("int4", "fp16")], ids="+".join)
def test_a_captured_graph_follows_the_table(tokens, tiers):
    """Replayed, it equals an eager run; after a publication between two replays, an eager run at the new precision."""
    got = on_gpu(case_by_rows(tiers, torch.bfloat16, WIDE, distinct_choices(tokens, 3)))
    table = got.upgrades.entries
    published = table.clone()
    output = torch.empty_like(got.hidden_states)

    def forward() -> None:
        # A snapshot of the row is part of the forward, as in `MixedPrecisionExperts`.
        snapshot = Upgrades(table.clone(), got.upgrades.bytes_at)
        output.copy_(replace(got, upgrades=snapshot).run(dispatch.expert_mlp))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    results = []
    for entries in (published, torch.zeros_like(published), published):
        table.copy_(entries)
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, got.run(dispatch.expert_mlp))
        results.append(output.clone())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1]), "precision has to be seen in the output"


def test_other_inputs_in_a_captured_graph():
    """The number of blocks differs from one replay to the next; the grid does not."""
    got = on_gpu(case_by_rows(("int2", "int4"), torch.bfloat16, WIDE, distinct_choices(24, 3)))
    output = got.run(dispatch.expert_mlp)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = got.run(dispatch.expert_mlp)
    for routes in (torch.full((24, 3), 5), distinct_choices(24, 3), torch.full((24, 3), EXPERTS)):
        got.top_k_index.copy_(routes)
        got.hidden_states.normal_()
        graph.replay()
        assert torch.equal(output, got.run(dispatch.expert_mlp))


def test_routing_is_counted_to_the_last_unit():
    ids, weights = torch.randint(-1, EXPERTS + 2, (900, 3)), torch.rand(900, 3)
    expected = RoutingCounter(1, EXPERTS, torch.device("cpu"))
    expected.observe(0, ids, weights)
    got = on_gpu(replace(case_by_rows(("int4",), torch.bfloat16, GATED, ids), top_k_weights=weights))
    counts = torch.zeros(EXPERTS + 2, dtype=torch.int64, device=DEVICE)
    got.run(partial(dispatch.expert_mlp, counts=counts))
    assert torch.equal(counts.cpu(), expected.row(0, 1))
