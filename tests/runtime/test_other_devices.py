"""Devices without kernels, which the CPU plays, and those of AMD, of which PyTorch says what a test makes up."""

from types import SimpleNamespace
from typing import Any

import patching
import pytest
import tiny
import torch
from shifting import EVENING, MORNING, assert_answers_as_published, patched, run, upgraded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynaexq.errors import SettingsError
from dynaexq.kernels import dispatch
from dynaexq.memory import copy_engine, pinned, slab_pool
from dynaexq.memory.pinned import Addressable


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU as a device that has no kernels and whose addresses are no numbers."""
    monkeypatch.setattr(dispatch, "BACKENDS", {})
    monkeypatch.setattr(slab_pool, "ADDRESSED", ())
    for function in (dispatch._backend, dispatch.decode_attention):
        function.cache_clear()
    yield
    dispatch._backend.cache_clear()


class NoDoubles(TorchDispatchMode):
    """A device that has no numbers of 64 bits with a point, as Apple's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves((args, output)) if isinstance(leaf, torch.Tensor)]
        assert not [tensor for tensor in found if tensor.dtype == torch.float64], func
        return output


def test_a_device_without_kernels_follows_the_traffic_and_says_that_it_is_slow(without_kernels, caplog):
    original = tiny.tiny_qwen3_moe(torch.float32, moe_intermediate_size=64)
    model = patched()
    assert "one after the other, which is slow: there are no kernels for it" in caplog.text
    for routes in (MORNING, EVENING):
        tiny.steer(model, routes)
        run(model, 4)
        assert upgraded(model) == [sorted(row[0]) for row in routes]
    tiny.steer(model, None)
    addresses = model.dynaexq.devices[0].memory.table.addresses().values()
    assert max(addresses) < 2**20, "names, and no addresses"
    assert len(set(addresses)) == 4
    assert_answers_as_published(model, original)
    with NoDoubles():
        tiny.logits(model)


def test_the_slab_of_a_device_without_addresses_grows_and_shrinks(without_kernels):
    model = patched()
    runtime, slot = model.dynaexq, model.dynaexq.plan.upgrade.nbytes
    for slots in (2, 9, 0, 5):
        runtime.set_budget(runtime.memory()["total"] - (runtime.stats()["slots"] - slots) * slot)
        assert runtime.stats()["slots"] == slots
        run(model, 2)
        assert sum(map(len, upgraded(model))) == slots


@pytest.mark.parametrize("device", ["mps", "xpu", "xpu:1"])
def test_a_device_that_is_not_here_is_said(device):
    with pytest.raises(SettingsError, match=f"device '{device}' was asked for, but this PyTorch finds none"):
        patching.patch(tiny.tiny_qwen3_moe(), "1GiB", device=device)


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")


@pytest.mark.parametrize(("name", "rows", "stages"), [("gfx942:sramecc+:xnack-", 64, 3), ("gfx1100", 32, 2)])
def test_tiles_follow_the_architecture_of_amd(rocm, monkeypatch, name, rows, stages):
    tuning = pytest.importorskip("dynaexq.kernels.triton.tuning")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    tuning.multiprocessor_of.cache_clear()
    found = tuning.multiprocessor_of(torch.device("cuda", 0))
    tuning.multiprocessor_of.cache_clear()
    assert (found.single_rows, found.least_pairs, found.stages) == (rows, 16, stages)


def test_amd_has_kernels_whatever_number_its_architecture_has(rocm, monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    bfloat16 = torch.bfloat16
    assert dispatch._obstacle_to_triton(torch.device("cuda", 0), bfloat16, bfloat16) is None
    assert "float32" in str(dispatch._obstacle_to_triton(torch.device("cuda", 0), torch.float32, torch.float32))


def test_words_for_a_device_of_amd_are_allocated_by_pytorch(rocm, monkeypatch):
    allocated = []
    zeros = torch.zeros

    def pinned_zeros(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        allocated.append(pin_memory)
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", pinned_zeros)
    monkeypatch.setattr(pinned, "PageLocked", lambda nbytes: pytest.fail("its address there is another"))
    words = Addressable(512)
    assert allocated == [True]
    assert words.bytes.numel() == 512
    assert not words.bytes.any()
    words.close()


def test_threads_leave_captures_alone_through_the_driver_at_hand(rocm, monkeypatch):
    opened = []

    def library(name: str) -> Any:
        opened.append(name)
        raise OSError(name)

    monkeypatch.setattr(copy_engine.ctypes, "CDLL", library)
    copy_engine.leave_captures_alone()
    assert opened == ["libamdhip64.so"]
