"""CUDA graphs on a real GPU: replays, however they came about, follow the traffic and answer as eager forwards do."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import patching
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from dynaexq.kernels import PlainExchange, exchange_for
from dynaexq.memory import HostMailbox

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
AMPLE, SECONDS, SLOTS = "1GiB", 30, 4
MORNING, EVENING = ((0, 1), (2, 3)), ((6, 7), (0, 5))
"""Experts that all tokens of each layer go to, at first and later."""


class Routes:
    """Where tokens go: buffers at fixed addresses, so that a captured graph can be sent elsewhere between replays."""

    def __init__(self, model: nn.Module, tokens: int):
        self.ids = [torch.zeros(tokens, 2, dtype=torch.int64, device=DEVICE) for _ in tiny.sparse_blocks(model)]
        for ids, block in zip(self.ids, tiny.sparse_blocks(model), strict=True):

            def choose(router: nn.Module, args: Any, output: Any, ids: Tensor = ids) -> Any:
                logits, weights, chosen = output
                return logits, torch.full_like(weights, 0.5), ids[: len(chosen)]

            block.gate.register_forward_hook(choose)

    def lead_to(self, experts: tuple[tuple[int, int], ...]) -> None:
        for ids, pair in zip(self.ids, experts, strict=True):
            ids.copy_(torch.tensor(pair).expand_as(ids))


def patched(**options: Any) -> nn.Module:
    """A tiny bfloat16 model with upgrade slots for four of its sixteen experts."""
    model = tiny.tiny_qwen3_moe(moe_intermediate_size=64)
    common = {"tiers": ("int2", "int4"), "quantizer": "rtn", "update_interval": 2, "half_life": 8, "auto_pause": False}
    runtime = patching.patch(model, AMPLE, device="cuda", **common | options)
    if runtime.plan.upgrade is not None:
        runtime.set_budget(runtime.memory()["total"] - (16 - SLOTS) * runtime.plan.upgrade.nbytes)
    return model


def prompt() -> Tensor:
    return tiny.prompt().to(DEVICE)


@torch.no_grad()
def eager(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def captured(model: nn.Module, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one forward over `ids`, and where it leaves the logits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids, use_cache=False).logits
    return graph, logits


def upgraded(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(row > 2).tolist()) for row in model.dynaexq.tiers())


def replay_until(work: Callable[[], Any], reached: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < end, f"not after {SECONDS} seconds of replays"
        work()
        torch.cuda.synchronize()


def pollers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dynaexq-poller"]


def test_words_are_exchanged_with_the_host_by_a_replay():
    exchange = exchange_for(DEVICE, torch.bfloat16)
    assert exchange is not None
    words, twin = HostMailbox(3, 200, DEVICE), HostMailbox(3, 200, torch.device("cpu"))
    entries = torch.zeros(3, 200, dtype=torch.int64, device=DEVICE)
    sums = torch.randint(0, 2**62, (3, 202), device=DEVICE)

    def forward() -> None:
        exchange.fetch(words.words, entries)
        exchange.report(words.words, sums, 1)

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    PlainExchange().fetch(twin.words, torch.zeros(3, 200, dtype=torch.int64))
    PlainExchange().report(twin.words, sums.cpu(), 1)
    for round in range(3):
        for side in (words, twin):
            side.table[:] = np.arange(600).reshape(3, 200) * (round + 1)
            side.begin_epoch()
        sums.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        expected = torch.zeros(3, 200, dtype=torch.int64)
        PlainExchange().fetch(twin.words, expected)
        PlainExchange().report(twin.words, sums.cpu(), 1)
        assert torch.equal(entries.cpu(), expected)
        assert torch.equal(words.words, twin.words)


def test_a_captured_graph_goes_on_switching_precision_and_answers_as_eager_does():
    model, ids = patched(), prompt()
    routes = Routes(model, ids.numel())
    routes.lead_to(MORNING)
    graph, logits = captured(model, ids)
    assert len(pollers()) == 1
    before, answers = model.dynaexq.stats()["demotions"], []
    for experts in (MORNING, EVENING, MORNING, EVENING):
        routes.lead_to(experts)
        replay_until(graph.replay, lambda experts=experts: upgraded(model) == experts)
        model.dynaexq.freeze()
        graph.replay()
        answers.append(logits.clone())
        torch.testing.assert_close(answers[-1], eager(model, ids), rtol=1e-2, atol=1e-2)
        model.dynaexq.thaw()
    assert torch.equal(answers[1], answers[3]), "the same experts at the same precision"
    assert not torch.equal(answers[0], answers[1])
    stats = model.dynaexq.stats()
    assert stats["demotions"] - before >= 3 * SLOTS
    assert stats["failed"] == 0
    model.dynaexq.close()
    assert not pollers()
    graph.replay()
    torch.testing.assert_close(logits, eager(model, ids), rtol=1e-2, atol=1e-2)


def test_several_graphs_and_eager_forwards_take_turns():
    """A prompt eager, tokens replayed: whoever comes after finds what was published before."""
    model = patched(half_life=2, hysteresis=0.0)
    long, short = prompt(), prompt()[:1, :4].contiguous()
    routes = Routes(model, long.numel())
    graphs = [captured(model, ids) for ids in (long, short)]
    before = model.dynaexq.stats()["demotions"]
    for turn in range(40):
        routes.lead_to((MORNING, EVENING)[turn // 5 % 2])
        eager(model, long)
        for graph, _ in graphs:
            graph.replay()
        torch.cuda.synchronize()
    assert model.dynaexq.stats()["demotions"] - before >= SLOTS
    model.dynaexq.freeze()
    for (graph, logits), ids in zip(graphs, (long, short), strict=True):
        graph.replay()
        torch.testing.assert_close(logits, eager(model, ids), rtol=1e-2, atol=1e-2)
    assert model.dynaexq.stats()["steps"] >= 40 * 3
    model.dynaexq.close()


def test_the_budget_shrinks_and_grows_between_replays():
    model, ids = patched(), prompt()
    graph, logits = captured(model, ids)
    runtime = model.dynaexq
    slot, total = runtime.plan.upgrade.nbytes, runtime.memory()["total"]
    for slots in (0, 7, 2, SLOTS):
        graph.replay()
        runtime.set_budget(total + (slots - SLOTS) * slot)
        runtime.freeze()
        graph.replay()
        torch.testing.assert_close(logits, eager(model, ids), rtol=1e-2, atol=1e-2)
        runtime.thaw()
    runtime.close()


def test_a_forgotten_model_that_is_collected_during_a_capture_leaves_it_alone():
    forgotten = patched()
    eager(forgotten, prompt())
    other, values = torch.cuda.CUDAGraph(), torch.ones(8, device=DEVICE)
    torch.cuda.synchronize()
    gc.disable()
    del forgotten
    with torch.cuda.graph(other, capture_error_mode="global"):
        values.add_(1)
        assert gc.collect()
    gc.enable()
    other.replay()
    assert values.tolist() == [2.0] * 8


@pytest.mark.parametrize("host_copy", ["ram", "pinned"])
def test_moves_of_one_model_leave_the_capture_of_another_alone(host_copy: str):
    """In the mode that forbids most: no thread may make a call that might synchronize while any captures."""
    moving, ids = patched(host_copy=host_copy, half_life=2, hysteresis=0.0), prompt()
    routes = Routes(moving, ids.numel())
    graph, _ = captured(moving, ids)
    graph.replay()
    torch.cuda.synchronize()
    before = moving.dynaexq.stats()["promotions"]
    for turn in range(10):
        routes.lead_to((MORNING, EVENING)[turn % 2])
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        other = torch.cuda.CUDAGraph()
        values = torch.ones(8, device=DEVICE)
        with torch.cuda.graph(other, capture_error_mode="global"):
            values.add_(1)
            time.sleep(0.02)  # for the poller to look, decide and copy meanwhile
            values.add_(1)
        other.replay()
        assert values.tolist() == [3.0] * 8
    assert moving.dynaexq.stats()["promotions"] > before + SLOTS, "nothing moved while others captured"
    moving.dynaexq.close()


@torch.no_grad()
def test_the_host_never_waits_for_the_device():
    model, ids = patched(), prompt()
    routes = Routes(model, ids.numel())
    routes.lead_to(MORNING)
    graph, _ = captured(model, ids)
    rows = torch.randn(1, ids.numel(), model.config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            graph.replay()
            for block in tiny.sparse_blocks(model):  # eager, and it ticks
                block(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replay_until(graph.replay, lambda: upgraded(model) == MORNING)
    model.dynaexq.close()


def test_generate_captures_decoding_with_a_static_cache_and_precision_goes_on_moving(monkeypatch):
    model, common = patched(update_interval=4), {"do_sample": False, "cache_implementation": "static"}
    monkeypatch.setattr(torch, "compile", None)
    runtime = model.dynaexq
    model.generate(prompt(), max_new_tokens=16, **common)
    assert len(pollers()) == 1, "a capture was seen"
    torch.cuda.synchronize()
    before = runtime.stats()
    model.generate(prompt(), max_new_tokens=64, **common)
    torch.cuda.synchronize()
    after = runtime.stats()
    assert after["steps"] - before["steps"] == 64, "each forward was reported, replayed or not"
    assert after["ticks"] > before["ticks"]
    runtime.freeze()
    replayed = model.generate(prompt(), max_new_tokens=64, **common)
    plain = model.generate(prompt(), max_new_tokens=64, **common, disable_compile=True)
    assert torch.equal(replayed, plain), "the same kernels on the same numbers"
    runtime.close()


def test_graphs_of_many_calls_leave_no_memory_behind():
    model, common = patched(), {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 8}
    for _ in range(3):
        model.generate(prompt(), **common)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(10):
        model.generate(prompt(), **common)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= before
    model.dynaexq.close()


@pytest.mark.filterwarnings("ignore")
def test_a_static_cache_is_compiled_where_that_is_asked_for_and_precision_goes_on_moving():
    model = patched(update_interval=4)
    common = {"do_sample": False, "cache_implementation": "static", "compile_config": CompileConfig()}
    assert model.hf_quantizer.is_compileable
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    model.generate(prompt(), max_new_tokens=16, **common)
    assert len(pollers()) == 1, "a capture was seen"
    torch.cuda.synchronize()
    before = model.dynaexq.stats()
    model.generate(prompt(), max_new_tokens=64, **common)
    torch.cuda.synchronize()
    after = model.dynaexq.stats()
    assert after["steps"] - before["steps"] == 64, "each forward was reported, replayed or not"
    assert after["ticks"] > before["ticks"]
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips, "mutated inputs, or others"
    model.dynaexq.freeze()
    compiled = model.generate(prompt(), max_new_tokens=16, **common)
    plain = model.generate(prompt(), max_new_tokens=16, **common | {"compile_config": None}, disable_compile=True)
    assert (compiled == plain).float().mean() > 0.9, "bfloat16 rounds differently in fused kernels; few tokens differ"
    model.dynaexq.close()


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_replays_its_graphs_and_precision_goes_on_moving():
    model = patched(update_interval=4)
    inputs = [tiny.prompt(1, length, seed=length)[0].tolist() for length in (3, 9, 12)]
    config = GenerationConfig(max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0)

    def written(graphs: bool) -> list[list[int]]:
        limits = ContinuousBatchingConfig(
            block_size=32, num_blocks=32, max_batch_tokens=64, max_requests_per_batch=4, use_cuda_graph=graphs
        )
        answers = model.generate_batch(inputs, config, limits)
        assert not any(answer.error for answer in answers.values())
        return [answer.generated_tokens for answer in answers.values()]

    written(graphs=True)
    assert len(pollers()) == 1, "a capture was seen"
    ticks, steps = (model.dynaexq.stats()[name] for name in ("ticks", "steps"))
    written(graphs=True)
    assert model.dynaexq.stats()["steps"] >= steps + 48
    assert model.dynaexq.stats()["ticks"] > ticks
    model.dynaexq.freeze()
    same = np.equal(written(graphs=True), written(graphs=False)).mean()
    assert same > 0.9, f"only {same:.0%} of the tokens are those without graphs"
    model.dynaexq.close()
