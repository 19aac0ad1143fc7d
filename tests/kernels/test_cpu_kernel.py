"""The native CPU kernel: every instruction set of this machine against the reference, its threads, its compiler.

What every kernel must do is in test_kernels.py; here is what only this one has.
"""

import ctypes
import logging
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_cases import EXPERTS, GATED, TOLERANCE, UGLY, Case, case, distinct_choices, fused
from numerics import assert_close
from torch.nn import functional as F

from dynaexq.hf.discovery import activation_name
from dynaexq.kernels import cpu, reference
from dynaexq.kernels.cpu import build, interface, native, threads, torch_path
from dynaexq.memory import RoutingCounter
from dynaexq.types import ALL_TIERS, ExpertShape

CODED = [tiers for tiers in ALL_TIERS if tiers != ("fp16",)]
HELPERS = Path(__file__).parent.parent / "helpers"
AVAILABLE = [target for target in build.INSTRUCTION_SETS if build.cpu_features().issuperset(target.features)]

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs AVX2 on Linux")


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        build.find_compiler()
    except build.Unavailable as missing:
        pytest.skip(str(missing))


def check(name: str, got: Case, kernel: build.Kernel | None = None, times: int = 1) -> None:
    layer, dtype = got.layer, got.hidden_states.dtype
    run = cpu.native_layer(layer, dtype) if kernel is None else native.NativeLayer(layer, dtype, kernel)
    assert run is not None, "the native kernel takes every coded layer"
    output = run(got.hidden_states, got.top_k_index, got.top_k_weights, got.upgrades.entries)
    assert_close(name, got.run(reference.expert_mlp), output, times * TOLERANCE[dtype])


@pytest.mark.parametrize("num_tokens", [1, 5, 40], ids="{} tokens".format)
@pytest.mark.parametrize("tiers", CODED, ids="+".join)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_few_rows_and_many_follow_the_reference_in_every_format(tiers, dtype, num_tokens):
    for name, shape in UGLY.items():
        check(f"{tiers} {dtype} {name}", fused(tiers, dtype, shape, num_tokens))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tiers", CODED, ids="+".join)
def test_every_group_size_follows_the_reference(tiers, group_size):
    for num_tokens in (2, 30):
        check(
            f"{tiers} {group_size}",
            fused(tiers, torch.bfloat16, UGLY["256 and 128"], num_tokens, group_size=group_size),
        )


@pytest.mark.parametrize("target", AVAILABLE[1:], ids=lambda target: target.name)
@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lesser_instruction_sets_follow_the_reference(target, dtype, activations):
    kernel = build.open_library(build.compiled(target)).forward
    for tiers in CODED:
        for name, shape in UGLY.items():
            for num_tokens in (3, 40):
                got = fused(tiers, dtype, shape, num_tokens, activations=activations)
                check(f"{target.name} {tiers} {name} {activations}", got, kernel, 1 + (activations == "int8"))


@pytest.mark.parametrize("num_tokens", [1, 4, 60])
def test_the_result_does_not_depend_on_the_number_of_threads(num_tokens):
    shape = ExpertShape(512, 320, 640, has_bias=False, transposed=False)
    got = fused(("int4", "fp16"), torch.bfloat16, shape, num_tokens)
    alone = got.run(cpu.expert_mlp)
    try:
        for number in (2, 3, 4):
            torch.set_num_threads(number)
            assert_close(f"{number} threads", alone, got.run(cpu.expert_mlp), 0)
    finally:
        torch.set_num_threads(1)
    assert threads.parallel(), "PyTorch's threads were found, else this test shows nothing"


PARALLEL = ctypes.CFUNCTYPE(
    None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
)


@pytest.mark.parametrize("lost", ["at the end", "in between", "never"])
def test_what_a_call_has_lost_is_what_its_caller_waited_or_stood_still(monkeypatch, lost):
    pause, calls, seen = 0.02, [], []

    def parallel(work, data, num_threads, flags):
        calls.append((num_threads, flags))
        if lost == "in between":
            time.sleep(pause)
        began = time.thread_time()
        while lost == "never" and time.thread_time() < began + pause:
            pass
        work(data)
        if lost == "at the end":
            time.sleep(pause)

    start = PARALLEL(parallel)
    monkeypatch.setattr(interface.threads, "parallel", lambda: ctypes.cast(start, ctypes.c_void_p).value)
    monkeypatch.setattr(interface, "team", SimpleNamespace(size=2, observe=lambda *seconds: seen.append(seconds)))
    got = fused(("int4", "int8"), torch.float32, GATED, 64)
    began, ran = time.monotonic(), time.thread_time()
    check(f"lost {lost}", got)
    elapsed, off_core = time.monotonic() - began, time.monotonic() - began - (time.thread_time() - ran)
    ((took, counted),) = seen
    assert set(calls) == {(2, 0)}
    assert pause * len(calls) <= took <= elapsed
    assert (0 if lost == "never" else pause * len(calls)) <= counted <= off_core + pause / 2


def test_a_forked_child_computes_the_same_on_one_thread():
    got = fused(("int4",), torch.bfloat16, ExpertShape(512, 320, 640, False, False), 60)
    program = "\n".join(
        [
            "import os, sys, torch",
            f"sys.path[:0] = {[str(Path(__file__).parent), str(HELPERS)]!r}",
            "from test_cpu_kernel import *",
            "torch.set_num_threads(2)",
            "got = fused(('int4',), torch.bfloat16, ExpertShape(512, 320, 640, False, False), 60)",
            "before = got.run(cpu.expert_mlp)",
            "child = os.fork()",
            "if child == 0: os._exit(0 if torch.equal(got.run(cpu.expert_mlp), before) else 1)",
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        ]
    )
    got.run(cpu.expert_mlp)  # compiled before the clock of the child runs
    assert subprocess.run((sys.executable, "-W", "ignore", "-c", program), timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
        ("relu2", lambda x: F.relu(x).square()),
    ],
)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_a_named_activation_is_what_its_name_says(name, function, gated):
    got = case(("int8",), torch.float32, GATED if gated else replace(GATED, up_rows=32), distinct_choices(40, 3))
    activation = (lambda rows: function(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1]) if gated else function
    layer = replace(got.layer, activation=activation, activation_name=name)
    check(name, replace(got, layer=layer, hidden_states=got.hidden_states * 20))  # far into both tails


def test_an_activation_without_a_name_runs_in_python_over_all_rows_at_once():
    calls = []

    def clamped(rows):
        calls.append(len(rows))
        gate, up = rows.chunk(2, -1)
        return F.silu(gate.clamp(max=1)) * up

    got = case(
        ("int4", "int8"), torch.bfloat16, UGLY["128 and 320, bias"], torch.tensor([[0, -1], [EXPERTS, 3], [3, 7]])
    )
    got = replace(got, layer=replace(got.layer, activation=clamped))
    fast = got.run(cpu.expert_mlp)
    assert calls == [6]
    assert_close("clamped", got.run(reference.expert_mlp), fast, TOLERANCE[torch.bfloat16])


def test_rows_of_another_dtype_than_the_model_are_taken():
    got = fused(("int4", "fp16"), torch.bfloat16, UGLY["256 and 128"], 12)
    got = replace(got, hidden_states=got.hidden_states.float())
    codec_in_float32 = got.run(reference.expert_mlp)
    check_against = cpu.native_layer(got.layer, torch.float32)
    output = check_against(got.hidden_states, got.top_k_index, got.top_k_weights, got.upgrades.entries)
    assert_close("float32 rows", codec_in_float32, output, 2**-7)  # the reference multiplies bfloat16 experts as such


def test_routing_is_counted_as_the_counter_of_the_device_counts_it():
    index = torch.tensor([[0, 3, EXPERTS], [-1, 3, 7], [5, 0, 2]])
    got = case(("int4",), torch.float32, top_k_index=index)
    weights = torch.tensor([[0.3, 0.7, 1.0], [float("nan"), float("inf"), -1.0], [1e9, 2**-21, 1.5 * 2**-20]])
    expected, found = (RoutingCounter(2, EXPERTS, torch.device("cpu")) for _ in range(2))
    for _ in range(2):
        expected.observe(1, index, weights)
        layer = cpu.native_layer(got.layer, torch.float32)
        layer(got.hidden_states, index, weights, got.upgrades.entries, found.row(1, index.shape[1]))
    assert found.sums.tolist() == expected.sums.tolist()


def test_what_the_kernel_does_not_do_goes_to_torch():
    assert cpu.native_layer(case(("fp16",)).layer, torch.bfloat16) is None
    assert cpu.native_layer(case(("int4",), post_norm=torch.nn.Identity()).layer, torch.bfloat16) is None
    assert cpu.native_layer(case(("int4",)).layer, torch.float64) is None
    assert cpu.native_layer(case(("int4",)).layer, torch.bfloat16) is not None


@pytest.fixture
def _fresh_loader(monkeypatch):
    build.load.cache_clear()
    yield
    monkeypatch.undo()
    build.load.cache_clear()


@pytest.mark.usefixtures("_fresh_loader")
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DYNAEXQ_CPU_KERNEL": "torch"}, "DYNAEXQ_CPU_KERNEL=torch"),
        ({"DYNAEXQ_CPU_KERNEL": "neon"}, "expected a Linux machine with neon"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler found"),
        ({"CXX": "false"}, "failed"),
        ({"CXX": "SLOW"}, "did not end within 0.3 seconds"),
    ],
)
def test_without_a_kernel_torch_takes_over_and_the_log_says_why_once(monkeypatch, caplog, tmp_path, variables, reason):
    got = fused(("int4",), torch.bfloat16, GATED, 4)
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nsleep 1000\n')
    slow.chmod(0o755)
    monkeypatch.setattr(build, "SECONDS_TO_COMPILE", 0.3)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    for name, value in ({"DYNAEXQ_CACHE_DIR": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, str(slow) if value == "SLOW" else value)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_close("torch", got.run(torch_path.expert_mlp), got.run(cpu.expert_mlp), 0)
            got.layer.prepared.clear()
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]


def test_a_kernel_is_compiled_once_and_kept_under_its_source_compiler_flags_and_cpu(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho run >> "$0.runs"\nfor last; do :; done\n: > "$last"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DYNAEXQ_CACHE_DIR", str(tmp_path / "cache"))
    libraries = {build.compiled(AVAILABLE[-1], flags) for flags in ((), (), ("-g",))}
    assert len(libraries) == 2
    assert len(Path(f"{compiler}.runs").read_text().splitlines()) == 2
    assert set((tmp_path / "cache").iterdir()) == libraries, "nothing unfinished is left"
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset({"another"}))
    assert build.compiled(AVAILABLE[-1]) not in libraries


@pytest.mark.usefixtures("_fresh_loader")
def test_what_came_with_the_package_needs_no_compiler_and_a_compiler_that_is_named_is_used(monkeypatch, tmp_path):
    target = build.instruction_set()
    whole = build.compiled(build.AVX512_VNNI if target is build.AVX512_BF16 else target)
    shutil.copy(whole, tmp_path / f"moe-{AVAILABLE[-1].name}.so")
    monkeypatch.setattr(build, "SHIPPED", tmp_path)
    monkeypatch.setenv("DYNAEXQ_CPU_KERNEL", AVAILABLE[-1].name)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    got = fused(("int4",), torch.bfloat16, GATED, 4)
    assert cpu.native_layer(got.layer, torch.bfloat16) is not None
    monkeypatch.setenv("CXX", "c++")
    assert build.shipped(AVAILABLE[-1]) is None


def test_the_last_compiler_is_one_that_comes_as_a_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    package = ModuleType("ziglang")
    package.__spec__ = ModuleSpec("ziglang", None)
    monkeypatch.setitem(sys.modules, "ziglang", package)
    assert build.find_compiler() == build.ZIG
    assert "-mcpu=generic+v8_2a+dotprod" in build.flags_for(build.NEON, build.ZIG), "it has other names for Arm"
    assert "-march=armv8.2-a+dotprod" in build.flags_for(build.NEON, ("g++",))


def test_only_the_standard_gate_has_a_name():
    class Experts:
        has_gate, is_concatenated, act_fn = True, True, torch.nn.SiLU()

        def _apply_gate(self, rows):
            return rows

    experts = Experts()
    assert activation_name(experts) is None
    from transformers.integrations.moe import _default_apply_gate

    Experts._apply_gate = _default_apply_gate
    assert activation_name(experts) == "silu"
    experts._apply_gate = lambda rows: rows
    assert activation_name(experts) is None
    del experts._apply_gate
    Experts.is_concatenated = False
    assert activation_name(experts) is None
    Experts.is_concatenated, Experts.act_fn = True, torch.nn.Mish()
    assert activation_name(experts) is None


def test_structures_have_the_sizes_that_c_gives_them():
    sizes = {
        "Part": 2,
        "Reading": 13,
        "Matrix": 4 + 2 * 13,
        "Layer": 2 * 30 + 7,
        "Call": 18,
        "Norm": 8,
        "Attention": 31,
        "BeforeAttention": 37,
        "AfterAttention": 29,
    }
    assert sizes == {name: ctypes.sizeof(getattr(interface, name)) // 8 for name in sizes}
