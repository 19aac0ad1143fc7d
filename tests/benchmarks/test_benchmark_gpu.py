"""The GPU benchmark where there is no GPU: it says so, and its parts can at least be read and put together."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / "gpu" / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))


def test_without_a_gpu_it_refuses_with_a_sentence(tmp_path):
    done = run("layers", "--quick", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_knows_its_arguments():
    assert run("layers", "--slow").returncode == 2
    done = run("layer", "--dry-run")
    assert done.returncode == 2
    assert "there is no call 'layer'" in done.stderr


def dry_run(call: str, out: Path) -> dict:
    """What a call found when it was run without a GPU."""
    done = run(call, "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"gpu-a-cpu-dry-run-{call}.json").read_text())


@pytest.mark.timeout(400)  # it has a limit of its own for each part
def test_tests_run_dry(tmp_path):
    assert {row["tests"]: row["outcome"].split(":")[0] for row in dry_run("tests", tmp_path)["tests"]} == {
        "copier": "passed",
        "kernels": "passed",
        "graphs": "passed",
        "memcheck": "not run",
    }


def test_layers_run_dry(tmp_path):
    assert {row["what"] for row in dry_run("layers", tmp_path)["layers"]} >= {"int4", "Transformers grouped_mm"}


def test_moves_run_dry(tmp_path):
    found = dry_run("moves", tmp_path)
    assert len(found["link"]) == 2
    assert any(row["moves"] for row in found["swapping"])


def test_generate_runs_dry(tmp_path):
    ways = {(row["model"], row["way"]) for row in dry_run("generate", tmp_path)["generate"]}
    assert {way for model, way in ways if model == "Transformers, 16 bit"} == {"eager", "static cache, compiled"}
    assert ("int2+int4, dynamic", "static cache") in ways


def test_long_runs_dry(tmp_path):
    for row in dry_run("long", tmp_path)["long"]:
        assert row["promotions"] > row["upgrades_compared"] > 0
        assert row["failed"] == 0


def test_tune_runs_dry(tmp_path):
    means = [row["geometric_mean"] for row in dry_run("tune", tmp_path)["tune"]]
    assert len(means) == 7
    assert means == sorted(means, reverse=True)


def test_model_runs_dry(tmp_path):
    found = dry_run("model", tmp_path)
    assert len(found["model"]) == 2 * 3 * 2, "pairs, sizes, static and dynamic"
    for row in found["model"]:
        assert row["p99_microseconds"] >= row["median_microseconds"] > 0
        assert row["precision"] == "dynamic" or row["megabytes_a_second_copied"] == 0
    assert any(row["megabytes_a_second_copied"] > 0 for row in found["model"]), "nothing was swapped"
    assert (tmp_path / found["overlap"][0]["trace"]).stat().st_size > 0
    assert found["overlap"][0]["beside_kernels"] is None, "a CPU has no copies to hide"


def test_all_is_every_call(benchmarks, tmp_path, monkeypatch):
    import gpu

    called = []
    monkeypatch.setattr(gpu, "RUNNERS", {name: lambda bench: called.append(bench.call) for name in gpu.RUNNERS})
    with pytest.raises(typer.Exit) as ended:
        gpu.main("all", tmp_path, dry_run=True)
    assert ended.value.exit_code == 0
    assert called == ["tests", "layers", "moves", "model", "generate", "tune", "long"]


def test_what_goes_wrong_is_written_beside_what_was_found(benchmarks, tmp_path, monkeypatch):
    import gpu

    def call(bench):
        bench.add("link", [{"gigabytes_a_second": 1.0}])
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(gpu.RUNNERS, "moves", call)
    assert not gpu.run(gpu.Bench("moves", tmp_path, quick=True, dry=True))
    found = json.loads((tmp_path / "gpu-a-cpu-dry-run-moves.json").read_text())
    assert found["link"] == [{"gigabytes_a_second": 1.0}]
    assert found["wrong"] == [{"call": "moves", "error": "RuntimeError: illegal memory access"}]


def test_tests_that_hang_or_fail_are_told(benchmarks, tmp_path):
    import gpu_tests

    log = tmp_path / "log.txt"
    hung = gpu_tests._row(gpu_tests.Run("hangs", (), 1), [sys.executable, "-c", "import time; time.sleep(60)"], log)
    assert hung["outcome"] == "stopped after 1 seconds"
    failing = [sys.executable, "-c", "print('== 1 failed, 2 passed in 3.00s =='); raise SystemExit(1)"]
    failed = gpu_tests._row(gpu_tests.Run("fails", (), 30), failing, log)
    assert (failed["outcome"], failed["summary"]) == ("exit status 1", "1 failed, 2 passed in 3.00s")


def test_a_wrong_byte_in_an_upgrade_is_found(benchmarks):
    import gpu_long

    model = toy()
    assert not gpu_long.wrong_upgrades(model.dynaexq)
    (key, address), *_ = model.dynaexq.devices[0].pipeline.table.addresses().items()
    model.dynaexq.devices[0].pipeline.pool.at(address)[100] ^= 1
    assert gpu_long.wrong_upgrades(model.dynaexq) == [key]
    model.dynaexq.close()


def test_bytes_that_a_product_reads(benchmarks):
    import gpu_layers

    shape = gpu_layers.Shape("small", num_experts=10, choices=2, hidden_size=64, intermediate_size=32)
    source = gpu_layers.source_experts(shape, torch.device("cpu"))
    for tiers, upgraded in ((("int2", "int4"), "base and plane"), (("int4", "fp16"), "the 16-bit block alone")):
        mix = gpu_layers.build(shape, tiers, 0.2, source)
        codec = mix.layer.codec
        both = codec.upgrade.nbytes + (codec.base.nbytes if upgraded == "base and plane" else 0)
        assert sorted(mix.expert_bytes().tolist()) == sorted([codec.base.nbytes] * 8 + [both] * 2), upgraded


def test_no_16_bit_expert_is_held(benchmarks):
    model = toy()
    assert not [name for name, tensor in model.named_parameters() if "experts" in name or tensor.is_meta]
    assert model.dynaexq.stats()["upgraded"] == int(0.2 * 16)
    assert model.dynaexq.memory()["total"] <= model.dynaexq.plan.budget
    model.dynaexq.close()


def toy():
    import random_model

    sizes = {**random_model.TOY, "num_hidden_layers": 2}
    return random_model.build(sizes, ("int2", "int4"), random_model.Rotation(), torch.device("cpu"))


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
        "layers": [row, row | {"tokens": 8, "captured": False}],
        "link": [{"a": 1}],
    }
    text = gpu.write(found, "layers", tmp_path)
    assert "|  | 1 | 8 |" in text
    assert "| int4 | 12 | 12 * |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-some-gpu-layers.json", "gpu-some-gpu-layers.md"]


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
