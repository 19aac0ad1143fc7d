"""The Triton kernels without a GPU: interpreted, to see that they are right, and compiled, to see what became of them.

Both happen in processes of their own, because Triton decides at import whether it interprets.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux")

TESTS = Path(__file__).parent.parent
HELPERS = TESTS / "helpers"
RECORDED = json.loads((HELPERS / "compiled_kernels.json").read_text())
"""What Triton 3.9 makes of every case of compile_kernels.py."""

SAME_COMPILER = find_spec("triton") is not None and version("triton").startswith("3.9.")
"""Whether registers and instructions can be held against what was recorded; other compilers differ by an eighth."""

INTERPRETS = SAME_COMPILER or version("numpy") < "2.4"
"""The interpreter of Triton 3.6 wants numbers of arrays that NumPy 2.4 makes none of."""

MARGIN = 1.05
"""Codes that every group of warps unpacks again, or planes combined code by code, take a third more and beyond."""

PARKED = 16
"""Bytes that a thread may leave on the stack while a loop runs: ptxas does so to make room for another block."""

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a block may have, by compute capability."""

AMD = ("gfx942", "gfx1100")
AMD_SHARED_MEMORY = 64 * 1024

QUICK = [
    "int2+int4/up/few/90",
    "int4+int8/up/many/90",
    "int4+fp16/up/few/120",
    "int2+int8/down/single/86",
    "int3+int4/up/few/90",
    "int4+int6/down/many/86",
    "around/90",
]


interpreting = pytest.mark.skipif(not INTERPRETS, reason="this Triton's interpreter and this NumPy do not fit")


def run(*command: str, interpret: bool, **environment: str) -> str:
    """Standard output of a Python process; its failure is the test's."""
    environment |= {"TRITON_INTERPRET": "1" if interpret else "0"}
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment | {"PYTHONPATH": path},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def compile_kernels(cases: list[str], cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Facts of the kernels of every case; from an empty cache, so that they are those of this source."""
    lines = run(str(HELPERS / "compile_kernels.py"), *cases, interpret=False, TRITON_CACHE_DIR=str(cache)).splitlines()
    return {found["case"]: found["kernels"] for found in map(json.loads, lines)}


def check(case: str, kernels: list[dict[str, Any]]) -> None:
    arch = int(case.rpartition("/")[2])
    assert len(kernels) == len(RECORDED[case])
    for found, recorded in zip(kernels, RECORDED[case], strict=True):
        where = f"{case} {found.get('tiers', '')}: {found}, recorded {recorded}"
        assert found["spills_in_loops"] == 0, f"registers are spilled inside a loop, {where}"
        assert found["parked"] <= PARKED, f"registers are spilled, {where}"
        assert not SAME_COMPILER or found["registers"] <= MARGIN * recorded["registers"], f"more registers, {where}"
        assert found["shared"] <= SHARED_MEMORY[arch] * 1024, f"more shared memory than there is, {where}"
        if "tiers" not in found:
            assert found["widest_load"] >= recorded["widest_load"], f"rows are read in small pieces, {where}"
            continue
        assert found["stores"], f"a kernel of which the compiler left nothing but a trap, {where}"
        check_overlap(case, found, where)
        assert found["wide_loads"] >= recorded["wide_loads"], f"loads of 16 bytes were lost, {where}"
        # Eight pairs are half of what the wide instructions take.
        assert "/single/" in case or found["wgmma"] == (arch == 90), f"the wrong matrix instructions, {where}"
        per_code = recorded["instructions_per_code"], found["instructions_per_code"]
        assert not SAME_COMPILER or None in per_code or per_code[1] <= MARGIN * per_code[0], (
            f"more instructions a code, {where}"
        )


def check_overlap(case: str, found: dict[str, Any], where: str) -> None:
    """Where pairs are few, a block is multiplied while the next are on their way, with all that belongs to them."""
    if "/many/" in case or found["in_flight"] is None:
        return
    assert found["in_flight"] >= 2, f"a copy is waited for as soon as it is asked for, {where}"
    assert found["plain_loads"] == 0, f"loads in the middle of the loop, which nothing overlaps, {where}"


@interpreting
@pytest.mark.timeout(900)
def test_interpreted_kernels_follow_the_reference():
    run("-m", "pytest", "-q", "-m", "not slow", "tests/kernels/interpreted", interpret=True)


@pytest.mark.timeout(900)
def test_compiled_kernels_stay_within_what_was_recorded(tmp_path):
    found = compile_kernels(QUICK, tmp_path)
    assert list(found) == QUICK
    for case, kernels in found.items():
        check(case, kernels)


@pytest.mark.timeout(900)
def test_prompts_of_few_bits_are_more_than_a_trap_on_compute_capability_10(tmp_path):
    """Triton 3.6 leaves nothing of the tiles for many pairs there, so others are taken."""
    cases = ["int2/up/many/100", "int2+int4/down/many/100", "int3/up/many/100"]
    for kernels in compile_kernels(cases, tmp_path).values():
        assert all(kernel["stores"] and kernel["instructions_per_code"] for kernel in kernels), kernels


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", AMD)
def test_kernels_compile_for_amd(arch, tmp_path):
    products = [f"int2+int4/up/few/{arch}", f"int4+int8/down/single/{arch}", f"int4/up/many/{arch}"]
    found = compile_kernels([*products, f"around/{arch}"], tmp_path)
    for case, kernel in ((case, kernel) for case, kernels in found.items() for kernel in kernels):
        assert kernel["shared"] <= AMD_SHARED_MEMORY, case
        assert kernel["products"] or case not in products, f"no matrix instructions in {case}"
        # Half as many registers a lane: on gfx1100 some find no room, by Triton 3.6 far more of them.
        assert kernel["spilled"] == 0 or arch == "gfx1100", case


@interpreting
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreted_kernels_follow_the_reference_in_every_combination():
    run("-m", "pytest", "-q", "-m", "slow", "--timeout=3000", "tests/kernels/interpreted", interpret=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_on_every_architecture(arch, tmp_path):
    cases = [case for case in RECORDED if case.endswith(f"/{arch}")]
    for case, kernels in compile_kernels(cases, tmp_path).items():
        check(case, kernels)


@pytest.mark.timeout(300)
def test_what_is_compiled_ahead_is_all_that_forwards_launch(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path)}
    found = json.loads(run(str(HELPERS / "warm_up_program.py"), interpret=False, **environment).splitlines()[-1])
    assert found["ahead"] > 20
    assert found["by"] == []
    assert found["later"] == 0
