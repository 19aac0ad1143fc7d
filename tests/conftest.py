"""What every test stands on: no network, one thread, the same seeds, poisoned memory; a GPU only if there is one."""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings
from regimes import REGIMES

import dynaexq.memory

torch.set_num_threads(1)

# Triton decides when a kernel is decorated whether to interpret it; kernels/test_triton.py starts a process that does.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/interpreted"]

# The same examples on every run, and no deadline: a shared machine may pause for longer than any we could name.
settings.register_profile("stable", derandomize=True, deadline=None)
settings.load_profile("stable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what code that takes no generator draws from


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `allocate_bytes` returns with 0xFF: fresh mappings are zero, and zeros hide bytes never written."""
    allocate = dynaexq.memory.allocate_bytes

    @functools.wraps(allocate)
    def poisoned(nbytes: int, device: torch.device) -> torch.Tensor:
        memory = allocate(nbytes, device).fill_(0xFF)
        if memory.is_cuda:
            torch.cuda.synchronize()  # other streams may write at once
        return memory

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("allocate_bytes") is allocate:  # wherever it was imported by name
            monkeypatch.setattr(module, "allocate_bytes", poisoned)


@pytest.fixture
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take the tiles for so many pairs, however many there are."""
    from dynaexq.kernels.triton import tuning

    for name, value in REGIMES[request.param].items():
        monkeypatch.setattr(tuning, name, value)
    return request.param
