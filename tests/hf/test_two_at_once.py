"""Two processes at one target: each does its work as if it were alone, and nothing is damaged or left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import dynaexq
from dynaexq.kernels.cpu.build import find_compiler
from dynaexq.kernels.cpu.cache import is_whole

HERE = Path(__file__).parents[1] / "helpers"
PREAMBLE = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tiny, dynaexq, torch, random, time\n"

QUANTIZE = (
    "from dynaexq.hf.convert import quantize_checkpoint\n"
    "source, target = sys.argv[1:3]\n"
    "for line in sys.stdin:\n"
    "    time.sleep(random.random() * 0.05)\n"
    "    quantize_checkpoint(source, target, dynaexq.DynaExqConfig(tiers=('int4', 'int8'), quantizer='rtn'))\n"
    "    print('done', flush=True)\n"
)
PATCH = (
    "source, target = sys.argv[1:3]\n"
    "for line in sys.stdin:\n"
    "    time.sleep(random.random() * 0.05)\n"
    "    model = tiny.tiny_qwen3_moe()\n"
    "    config = {'quantizer': 'rtn'}\n"
    "    runtime = dynaexq.patch(model, '10MB', tiers=('int4', 'int8'), config=config)\n"
    "    model.save_pretrained(target)\n"
    "    runtime.save_hotness(target + '.hotness')\n"
    "    print('done', flush=True)\n"
)
COMPILE = (
    "from pathlib import Path\n"
    "from dynaexq.kernels.cpu.cache import cached\n"
    "from dynaexq.kernels.cpu.build import _compile, find_compiler\n"
    "source, target = sys.argv[1:3]\n"
    "from dynaexq.kernels.cpu import build\n"
    "build.SOURCES = Path(source)\n"
    "compiler = find_compiler()\n"
    "for line in sys.stdin:\n"
    "    time.sleep(random.random() * 0.02)\n"
    "    cached('moe.so', lambda library: _compile(compiler, ('-shared', '-fPIC'), library))\n"
    "    print('done', flush=True)\n"
)


def two(code: str, source: Path, target: Path, environment: dict[str, str]) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", PREAMBLE + code, str(source), str(target)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, **pipes)
        for _ in range(2)
    ]


def round_of(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == "done\n"


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.stdin.close()
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("code", [QUANTIZE, PATCH], ids=["quantize", "patch and save"])
def test_two_writers_of_one_checkpoint(code: str, rounds: int, tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    original = tiny.tiny_qwen3_moe()
    original.save_pretrained(source)
    dynaexq.patch(original, "10MB", tiers=("int4", "int8"), config={"quantizer": "rtn"})
    original.save_pretrained(tmp_path / "alone")
    alone = type(original).from_pretrained(tmp_path / "alone")
    place.mkdir()
    processes = two(code, source, place / "model", {})
    try:
        for _ in range(rounds):
            round_of(processes)
            loaded = type(original).from_pretrained(place / "model")
            assert (tiny.logits(loaded) == tiny.logits(alone)).all()
            loaded.dynaexq.close()
    finally:
        end(processes)
    assert {path.name for path in place.iterdir()} <= {"model", "model.hotness"}


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_two_compilers_of_one_kernel(rounds: int, tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    (source / "moe.cpp").write_text('extern "C" int dynaexq_forward(void*, void*) { return 7; }')
    find_compiler()
    processes = two(COMPILE, source, place, {"DYNAEXQ_CACHE_DIR": str(place)})
    try:
        for _ in range(rounds):
            round_of(processes)
            assert [path.name for path in place.iterdir()] == ["moe.so"]
            assert is_whole(place / "moe.so")
            (place / "moe.so").unlink()
    finally:
        end(processes)
