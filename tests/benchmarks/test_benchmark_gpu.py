"""The GPU benchmark where there is no GPU: it says so, and its parts can at least be read and put together."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / "gpu" / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))


def test_without_a_gpu_it_refuses_with_a_sentence(tmp_path):
    done = run("--quick", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_knows_its_arguments():
    assert run("--slow").returncode == 2


def test_its_mixes_run_and_agree_on_a_cpu(benchmarks, monkeypatch):
    import gpu_layers

    monkeypatch.setattr(gpu_layers, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_layers, "TOLERANCE", 1.5 * 2**-7)  # of the CPU path, which rounds weights as well
    gpu_layers.check(gpu_layers.Shape("small", num_experts=8, choices=2, hidden_size=64, intermediate_size=32))


def test_bytes_that_a_product_reads(benchmarks, monkeypatch):
    import gpu_layers

    monkeypatch.setattr(gpu_layers, "DEVICE", torch.device("cpu"))
    shape = gpu_layers.Shape("small", num_experts=10, choices=2, hidden_size=64, intermediate_size=32)
    source = gpu_layers.source_experts(shape)
    for tiers, upgraded in ((("int2", "int4"), "base and plane"), (("int4", "fp16"), "the 16-bit block alone")):
        mix = gpu_layers.build(shape, tiers, 0.2, source)
        codec = mix.layer.codec
        both = codec.upgrade.nbytes + (codec.base.nbytes if upgraded == "base and plane" else 0)
        assert sorted(mix.expert_bytes().tolist()) == sorted([codec.base.nbytes] * 8 + [both] * 2), upgraded


def test_whole_models_are_measured_static_and_dynamic_and_traced(benchmarks, tmp_path):
    import gpu_model

    work = gpu_model.Workload(torch.device("cpu"), 2, steps=40, shape=TINY, batches=(1, 2), prompts=(8,))
    found = gpu_model.run(work, tmp_path)
    assert len(found["model"]) == 2 * 3 * 2, "pairs, sizes, static and dynamic"
    for row in found["model"]:
        assert row["p99_microseconds"] >= row["median_microseconds"] > 0
        assert row["precision"] == "dynamic" or row["megabytes_a_second_copied"] == 0
    assert any(row["megabytes_a_second_copied"] > 0 for row in found["model"]), "nothing was swapped"
    assert (tmp_path / found["overlap"][0]["trace"]).stat().st_size > 0
    assert found["overlap"][0]["beside_kernels"] is None, "a CPU has no copies to hide"


def test_no_16_bit_expert_is_held(benchmarks):
    import gpu_model

    work = gpu_model.Workload(torch.device("cpu"), 2, steps=1, shape=TINY)
    model = gpu_model.build(work, ("int2", "int4"), gpu_model.Rotation())
    assert not [name for name, tensor in model.named_parameters() if "experts" in name or tensor.is_meta]
    assert model.dynaexq.stats()["upgraded"] == int(0.2 * 16)
    assert model.dynaexq.memory()["total"] <= model.dynaexq.plan.budget
    model.dynaexq.close()


def test_overlap_is_the_share_of_copy_time_beside_a_kernel(benchmarks):
    import gpu_model

    def event(cat: str, name: str, start: float, length: float) -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": start, "dur": length}

    events = [
        {"name": "metadata"},
        event("kernel", "gemm", 0, 100),
        event("kernel", "gemm", 50, 100),  # on another stream: together 0 to 150
        event("kernel", "gemm", 300, 100),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 100, 100),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 350, 100),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 0, 100),
    ]
    assert gpu_model.overlap(events) == {"copy_milliseconds": 0.2, "beside_kernels": 0.5}
    assert gpu_model.overlap(events[:4])["beside_kernels"] is None


def test_figures_become_tables(benchmarks, tmp_path):
    import gpu

    row = {"model": "m", "tokens": 1, "what": "int4", "microseconds": 12.3, "captured": True}
    found = {
        "gpu": "Some GPU",
        "torch": "2",
        "triton": "3",
        "ceilings": {"x": 1.0},
        "layers": [row],
        "link": [{"a": 1}],
    }
    found["layers"] = [row, row | {"tokens": 8, "captured": False}]
    text = gpu.write(found, tmp_path)
    assert "|  | 1 | 8 |" in text
    assert "| int4 | 12 | 12 * |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-some-gpu.json", "gpu-some-gpu.md"]


LAUNCHES = """
import host_time, triton
host_time.CALLS = host_time.ROUNDS = 1
triton.runtime.driver.set_active(host_time.Driver())
print(host_time.measured(host_time.experts_layer(1))["launches"])
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux")
@pytest.mark.timeout(300)
def test_a_layer_is_four_launches(tmp_path):
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS / "gpu"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", LAUNCHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "4"
