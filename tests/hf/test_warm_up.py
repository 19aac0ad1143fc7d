"""Kernels are compiled while a model is patched, and what goes wrong with that stops nobody."""

import threading

import patching
import pytest
import tiny
import torch

from dynaexq.hf import compat, warm_up
from dynaexq.kernels import compiles_on
from dynaexq.runtime.linear import PackedLinear


@pytest.fixture(autouse=True)
def _a_gpu_played_by_the_cpu(monkeypatch):
    monkeypatch.setattr(warm_up, "compiles_on", lambda device: True)


def test_on_a_cpu_nothing_is_compiled_ahead_and_no_weight_is_touched(monkeypatch):
    monkeypatch.setattr(warm_up, "compiles_on", compiles_on)
    monkeypatch.setattr(PackedLinear, "current", lambda self: pytest.fail("arranged before it is needed"))
    patching.patch(tiny.tiny_qwen3_moe(), "1GiB", dense="int8", device="cpu")


def test_layers_and_packed_matrices_are_handed_over_with_the_choices_of_a_token(monkeypatch):
    seen = []
    monkeypatch.setattr(warm_up, "compilations", lambda *arguments: seen.append(arguments) or [])
    model = tiny.tiny_qwen3_moe()
    patching.patch(model, "1GiB", dense="int8", device="cpu")
    ((experts, dense, choices),) = seen
    assert [layer.num_experts for layer in experts] == [8, 8]
    assert len(dense) == 2 * 4 + 1, "projections of attention, and the head"
    assert choices == 2


def test_all_is_compiled_on_threads_of_its_own_before_the_first_forward(monkeypatch):
    threads = []
    monkeypatch.setattr(
        warm_up, "compilations", lambda *_: [lambda: threads.append(threading.current_thread().name)] * 5
    )
    patching.patch(tiny.tiny_qwen3_moe(), "1GiB", device="cpu")
    assert len(threads) == 5
    assert all(name.startswith("dynaexq-compiling") for name in threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dynaexq-compiling")]


def test_what_cannot_be_compiled_is_said_and_the_model_is_patched(monkeypatch, caplog):
    monkeypatch.setattr(warm_up, "compilations", lambda *_: [lambda: 1 / 0, lambda: None])
    model = tiny.tiny_qwen3_moe()
    patching.patch(model, "1GiB", device="cpu")
    assert "1 kernels could not be compiled ahead: division by zero" in caplog.text
    assert torch.isfinite(tiny.logits(model)).all()


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = tiny.tiny_qwen3_moe()
    before = tiny.anatomy(model)
    monkeypatch.setattr(warm_up, "compilations", interrupt)
    with pytest.raises(KeyboardInterrupt):
        patching.patch(model, "1GiB", device="cpu")
    assert tiny.anatomy(model) == before


def test_a_family_that_hides_how_many_experts_a_token_takes_compiles_as_it_goes(monkeypatch):
    monkeypatch.setattr(compat, "EXPERTS_PER_TOKEN", ())
    monkeypatch.setattr(warm_up, "compilations", lambda *_: pytest.fail("it does not know for what"))
    patching.patch(tiny.tiny_qwen3_moe(), "1GiB", device="cpu")
