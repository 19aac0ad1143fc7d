"""Precision goes on moving while graphs are replayed: a whole model on a CPU that plays the GPU.

Here host and device are one memory, and what a captured graph replays is a forward in which the runtime's Python does
nothing: only fetch, layers and report. `tests/gpu/test_graphs.py` does the same with real graphs.
"""

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import numpy as np
import patching
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shifting import EVENING, MORNING, assert_answers_as_published, patched, upgraded
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import dynaexq
from dynaexq.errors import BudgetError, ClosedError, StoreError
from dynaexq.hf.quantizer import DynaExqQuantizer
from dynaexq.kernels import PlainExchange
from dynaexq.memory import HostMailbox
from dynaexq.memory.copy_engine import WORDS_PER_PAGE, Arrivals, Batch, last_word
from dynaexq.runtime.tick_loop import Poller, StepCount

SECONDS = 20  # long enough for any thread on any machine
PLAYED_BACK: ContextVar[bool] = ContextVar("PLAYED_BACK", default=False)


@pytest.fixture(autouse=True)
def _a_gpu_played_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaexq.runtime.device_runtime.exchange_for", lambda device, dtype: PlainExchange())
    monkeypatch.setattr("dynaexq.runtime.device_runtime.is_capturing", lambda device: PLAYED_BACK.get())


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Forwards of this thread are captured ones and their replays: the runtime's Python leaves them alone."""
    token = PLAYED_BACK.set(True)
    try:
        yield
    finally:
        PLAYED_BACK.reset(token)


def pollers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dynaexq-poller"]


def replay_until(model: nn.Module, reached: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    with replaying():
        while not reached():
            assert time.monotonic() < end, f"still {upgraded(model)} after {SECONDS} seconds of replays"
            tiny.logits(model)
            time.sleep(0.001)


def test_precision_follows_the_traffic_while_graphs_are_replayed() -> None:
    model, original = patched(), tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64)
    for routes in (MORNING, EVENING, MORNING):
        tiny.steer(model, routes)
        wanted = [sorted(row[0]) for row in routes]
        replay_until(model, lambda wanted=wanted: upgraded(model) == wanted)
    tiny.steer(model, None)
    assert_answers_as_published(model, original)
    with replaying():
        replayed = tiny.logits(model)
    assert torch.equal(replayed, tiny.logits(model))
    model.dynaexq.close()


def test_eager_forwards_and_replays_of_one_model_find_the_same_table() -> None:
    """The prompt eager, tokens replayed, over and over, while everything moves."""
    model, original = (
        patched(half_life=2, hysteresis=0.0),
        tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64),
    )
    before = model.dynaexq.stats()["demotions"]  # those of the smaller budget
    for turn in range(30):
        tiny.steer(model, (MORNING, EVENING)[turn // 5 % 2])
        tiny.logits(model)
        with replaying():
            for _ in range(3):
                tiny.logits(model)
    tiny.steer(model, None)
    assert model.dynaexq.stats()["demotions"] - before >= 4
    assert model.dynaexq.stats()["steps"] == 30 * 4
    assert_answers_as_published(model, original)
    tiny.logits(model)
    table = model.dynaexq.devices[0].memory.table
    np.testing.assert_array_equal(
        table.entries.numpy() & 0xFF, table.kinds(), "the device has what the host published"
    )
    model.dynaexq.close()


ORDERS = {
    "eager": lambda model, slots: tiny.logits(model),
    "morning": lambda model, slots: tiny.steer(model, MORNING),
    "evening": lambda model, slots: tiny.steer(model, EVENING),
    "tick": lambda model, slots: model.dynaexq.tick(),
    "freeze": lambda model, slots: model.dynaexq.freeze(),
    "thaw": lambda model, slots: model.dynaexq.thaw(),
    "drain": lambda model, slots: model.dynaexq.drain(),
    "grow": lambda model, slots: model.dynaexq.set_budget(slots(7)),
    "shrink": lambda model, slots: model.dynaexq.set_budget(slots(1)),
}


@settings(max_examples=15)
@given(orders=st.lists(st.sampled_from([*ORDERS, "replay", "replay", "replay"]), min_size=10, max_size=40))
def test_whatever_is_asked_between_replays_answers_stay_right(orders: list[str]) -> None:
    model, original = (
        patched(half_life=2, hysteresis=0.0),
        tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64),
    )
    slot, total = model.dynaexq.plan.upgrade.nbytes, model.dynaexq.memory()["total"]
    forwards = 0
    for order in orders:
        with replaying() if order == "replay" else contextlib.nullcontext():
            ORDERS.get(order, ORDERS["eager"])(model, lambda slots: total + (slots - 4) * slot)
        forwards += order in ("eager", "replay")
        assert model.dynaexq.memory()["total"] <= model.dynaexq.plan.budget
    assert model.dynaexq.stats()["steps"] == forwards
    tiny.steer(model, None)
    assert_answers_as_published(model, original)
    model.dynaexq.close()
    assert not pollers()


def test_routing_is_counted_to_the_last_token_in_replays() -> None:
    model = patched(policy="frozen")
    tiny.logits(model)
    with replaying():
        for _ in range(3):
            tiny.logits(model)
    model.dynaexq.tick()
    assert model.dynaexq.stats()["routed_mass"] == pytest.approx(model.dynaexq.routed_mass().sum())
    assert model.dynaexq.routed_mass().sum() == pytest.approx(2 * 4 * tiny.prompt().numel(), rel=1e-4)
    model.dynaexq.close()


def test_the_thread_begins_with_the_first_capture_and_ends_with_the_runtime() -> None:
    model = patched()
    tiny.logits(model)
    assert not pollers(), "an eager model ticks by itself"
    with replaying():
        tiny.logits(model)
        tiny.logits(model)
    assert len(pollers()) == 1
    assert pollers()[0].daemon, "a process that forgets to close ends all the same"
    model.dynaexq.close()
    assert not pollers()
    with replaying():
        tiny.logits(model)
    assert not pollers(), "a closed runtime does not begin again"


def test_the_thread_ends_when_a_patch_is_taken_back() -> None:
    model = tiny.tiny_qwen3_moe()
    dynaexq.patch(model, "1GiB", tiers=("fp16",))
    with replaying():
        tiny.logits(model)
    assert pollers()
    dynaexq.unpatch(model)
    assert not pollers()


def test_the_thread_does_not_keep_a_forgotten_model_alive() -> None:
    model = patched()
    runtime, slabs = weakref.ref(model.dynaexq), weakref.ref(model.dynaexq.devices[0].memory.pool)
    with replaying():
        tiny.logits(model)
    (thread,) = pollers()
    del model
    end = time.monotonic() + SECONDS
    while runtime() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert runtime() is None
    assert slabs() is None, "nothing leads from the fence back to the memory"
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_frozen_precision_stands_still_in_replays_and_thawed_it_moves() -> None:
    model = patched()
    tiny.steer(model, MORNING)
    replay_until(model, lambda: upgraded(model) == [[0, 1], [2, 3]])
    model.dynaexq.freeze()
    tiny.steer(model, EVENING)
    with replaying():
        for _ in range(50):
            tiny.logits(model)
            time.sleep(0.001)
    assert upgraded(model) == [[0, 1], [2, 3]]
    model.dynaexq.thaw()
    replay_until(model, lambda: upgraded(model) == [[6, 7], [0, 5]])
    model.dynaexq.close()


def test_the_budget_changes_between_replays_and_no_freed_slot_stays_in_the_device_table() -> None:
    model, original = patched(), tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64)
    runtime = model.dynaexq
    slot, total = runtime.plan.upgrade.nbytes, runtime.memory()["total"]
    for slots in (4, 0, 2, 7, 1, 4):
        runtime.set_budget(total + (slots - 4) * slot)
        assert runtime.memory()["total"] <= runtime.plan.budget
        for entry in runtime.devices[0].memory.table.entries[runtime.devices[0].memory.table.entries > 0].tolist():
            runtime.devices[0].memory.pool.at(entry & ~0xFF)  # a KeyError says that its memory is gone
        with replaying():
            for _ in range(5):
                tiny.logits(model)
    with pytest.raises(BudgetError):
        runtime.set_budget(1)
    assert_answers_as_published(model, original)
    runtime.close()


def test_a_policy_that_fails_on_the_thread_freezes_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def policy(score: np.ndarray, held: np.ndarray, slots: int) -> np.ndarray:
        raise RuntimeError("no opinion")

    model = patched(policy=policy)
    replay_until(model, lambda: "the policy failed" in caplog.text)
    assert model.dynaexq.health().state == "standing still"
    assert caplog.text.count("the policy failed") == 1
    assert pollers(), "it goes on observing"
    model.dynaexq.close()
    with pytest.raises(ClosedError):
        model.dynaexq.tick()


def test_no_tick_by_hand_while_this_thread_captures() -> None:
    model = patched()
    with replaying():
        assert not model.dynaexq.tick()
    assert model.dynaexq.tick()


def test_generate_may_compile_where_precision_follows_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    assert model.dynaexq.follows_replays
    assert model.hf_quantizer.is_compileable
    wrapped = DynaExqQuantizer(model.hf_quantizer.quantization_config, wrapped=model.hf_quantizer)
    wrapped.follows_replays = True
    assert wrapped.is_compileable
    model.hf_quantizer.follows_replays = False
    assert not wrapped.is_compileable, "dense weights that cannot be compiled are part of the graph"
    monkeypatch.undo()
    other = patched()
    assert other.hf_quantizer.is_compileable, "what is compiled for a CPU calls the operators each time"
    first, second = (rt.dynaexq.devices[0] for rt in (model, other))
    monkeypatch.setattr(type(second), "follows_replays", property(lambda part: part is first))
    groups = [dynaexq.Runtime(model, [(first, [0, 1]), (part, [2, 3])]) for part in (first, second)]
    assert [group.follows_replays for group in groups] == [True, False], "every device must"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_static_cache_is_compiled_and_gives_the_same_tokens() -> None:
    """What `generate` does on CUDA by itself: prompt eager, each token through `torch.compile`."""
    model = patched(policy="frozen")
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    common = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tiny.prompt(), **common, disable_compile=True)
    before = model.dynaexq.stats()["steps"]
    got = model.generate(tiny.prompt(), **common, compile_config=compile_config)
    assert torch.equal(got, expected)
    assert model.dynaexq.stats()["steps"] == before + 6
    assert hasattr(model, "_compiled_call"), "it was compiled"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tiers", [("int4",), ("int2", "int8")], ids="-".join)
def test_continuous_batching_answers_at_every_precision(tiers: tuple[str, ...], attention: str) -> None:
    """Whatever is changed for speed when some experts are packed: what the model is called must stay."""
    model = tiny.tiny_qwen3_moe(torch.float32)
    model.set_attn_implementation(attention)
    patching.patch(model, "1GiB", tiers=tiers, update_interval=1)
    assert model.config._attn_implementation == attention
    limits = ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=32)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers = model.generate_batch([[1, 2, 3], [4, 5, 6, 7]], config, limits, warmup=False)
    assert [(answer.error, len(answer.generated_tokens)) for answer in answers.values()] == [(None, 5)] * 2


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_gives_the_same_tokens_and_ticks() -> None:
    model = tiny.tiny_qwen3_moe(torch.float32)
    limits = ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=32)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)

    def written() -> list[list[int]]:
        answers = model.generate_batch([[1, 2, 3], [4, 5, 6, 7]], config, limits, warmup=False)
        assert [answer.error for answer in answers.values()] == [None, None]
        return [answer.generated_tokens for answer in answers.values()]

    expected = written()
    patching.patch(model, "1GiB", tiers=("fp16",), update_interval=1)
    assert written() == expected
    assert model.dynaexq.stats()["steps"] >= 5


def test_a_poller_ends_by_itself_when_looking_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def look(self) -> int:
            raise RuntimeError("nothing to see")

    broken = Broken()
    poller = Poller(broken.look)
    poller.start()
    end = time.monotonic() + SECONDS
    while poller.is_running and time.monotonic() < end:
        time.sleep(0.001)
    assert not poller.is_running
    assert "precision stands still" in caplog.text
    poller.stop()


def test_where_no_memory_can_be_locked_forwards_are_followed_and_replays_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("cannot page-lock 4,096 bytes of host memory (CUDA error 1)")

    monkeypatch.setattr("dynaexq.memory.device_memory.HostMailbox", refuse)
    model = patched(("int2", "int4"), auto_pause=False)
    assert "stands still while CUDA graphs are replayed: cannot page-lock" in caplog.text
    assert not model.dynaexq.devices[0].memory.follows_replays
    for routes, wanted in ((MORNING, [[0, 1], [2, 3]]), (EVENING, None)):
        tiny.steer(model, routes)
        for _ in range(8):
            tiny.logits(model)
        assert wanted is None or upgraded(model) == wanted
    assert model.dynaexq.stats()["promotions"] > 4


def test_a_poller_has_ended_when_its_runtime_is_gone() -> None:
    model = patched(("int2", "int4"))
    poller = model.dynaexq.devices[0].poller
    poller.start()
    assert poller.is_running
    del model
    gc.collect()
    assert not poller.is_running


def test_a_poller_may_stop_itself_and_starts_once() -> None:
    class Once:
        def __init__(self) -> None:
            self.poller, self.looks = Poller(self.look), 0

        def look(self) -> int:
            self.looks += 1
            self.poller.stop()  # as when the last reference to a runtime is the thread's own
            return self.looks

    once = Once()
    once.poller.start()
    once.poller.start()
    end = time.monotonic() + SECONDS
    while once.poller.is_running and time.monotonic() < end:
        time.sleep(0.001)
    assert once.looks == 1
    once.poller.start()
    assert not once.poller.is_running


def test_steps_are_those_that_python_began_or_those_that_were_reported() -> None:
    class Memory:
        reported_steps = 0

    memory = Memory()
    steps = StepCount(memory, update_interval=3)  # type: ignore[arg-type]
    for _ in range(3):
        assert not steps.is_due
        steps.add()
    assert steps.is_due
    assert steps.take() == 3
    memory.reported_steps = 3  # the same, ended
    assert not steps.is_due
    memory.reported_steps = 7  # and replays
    assert steps.is_due
    assert (steps.take(), steps.total, steps.take()) == (4, 7, 0)


def test_a_copy_has_come_when_its_last_bytes_have_come_back_whole() -> None:
    arrivals = Arrivals(locked=False)
    source = torch.randint(0, 256, (256,), dtype=torch.uint8)
    arrival = arrivals.expect(source, arrivals.take())
    assert not arrival.has_come()
    arrival.word.view(torch.uint8)[:7] = source[-8:-1]
    assert not arrival.has_come(), "seven of eight bytes"
    arrival.word.copy_(last_word(source))
    assert arrival.has_come()


@pytest.mark.parametrize("fill", [0, 255, 128])
def test_no_bytes_look_as_if_they_had_come_before_they_did(fill: int) -> None:
    arrivals, source = Arrivals(locked=False), torch.full((256,), fill, dtype=torch.uint8)
    for _ in range(3):  # the second time the word holds those very bytes
        arrival = arrivals.expect(source, arrivals.take())
        assert not arrival.has_come()
        arrival.word.copy_(last_word(source))
        assert arrival.has_come()


def test_there_are_words_for_any_number_of_copies_and_each_is_used_again() -> None:
    arrivals = Arrivals(locked=False)
    sources = torch.arange(3 * WORDS_PER_PAGE).view(-1, 1).repeat(1, 2).view(torch.uint8)
    waiting = [arrivals.expect(source, arrivals.take()) for source in sources]
    words = {arrival.word.data_ptr() for arrival in waiting}
    assert len(words) == len(waiting)
    for arrival, source in zip(reversed(waiting), sources.flip(0), strict=True):
        arrival.word.copy_(last_word(source))
        assert arrival.has_come()
    assert {arrivals.take().data_ptr() for _ in sources} == words


def test_one_word_says_that_all_copies_of_a_batch_have_come() -> None:
    queued: list[tuple[Tensor, Tensor]] = []
    arrivals = Arrivals(locked=False)
    batch = Batch(arrivals, lambda out, source: queued.append((out, source)))
    sources, slots = torch.randint(0, 256, (3, 256), dtype=torch.uint8), torch.zeros(3, 256, dtype=torch.uint8)
    for source, slot in zip(sources, slots, strict=True):
        batch.add(source, slot)
    assert not batch.has_come(), "it may go on"
    batch.end()
    assert len(queued) == 4, "three copies, one word"
    for out, source in queued:
        assert not batch.has_come()
        out.copy_(source)
    assert batch.has_come()
    assert torch.equal(slots, sources)
    assert batch.has_come(), "asked again, when its word may be another's"


def test_host_words_begin_at_zero_and_lie_apart() -> None:
    words = HostMailbox(2, 3, torch.device("cpu"))
    assert not words.words.any()
    assert words.begin_epoch() == words.epoch == 1
    words.table[1, 2] = 7
    words.counts[1, 4] = 9
    entries = torch.zeros(2, 3, dtype=torch.int64)
    PlainExchange().fetch(words.words, entries)
    assert entries.tolist() == [[0, 0, 0], [0, 0, 7]]
    PlainExchange().report(words.words, torch.arange(10).view(2, 5), steps=1)
    assert words.counts.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert words.table[1, 2] == 7
    assert (words.steps, words.seen) == (1, 0)
    PlainExchange().fetch(words.words, entries)
    PlainExchange().report(words.words, torch.zeros(2, 5), steps=0)
    assert (words.steps, words.seen) == (1, 1)


def test_a_look_says_how_many_forwards_there_were() -> None:
    model = patched()
    for _ in range(3):
        tiny.logits(model)
    assert model.dynaexq.devices[0]._look() == 3
