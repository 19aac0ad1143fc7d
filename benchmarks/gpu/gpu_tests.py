"""The tests for a GPU, each in a process with a time limit, and a small one of them under compute-sanitizer.

What they print goes to files. A hang or a crash of one is a row of the table, and the others are still run.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
SMALL = ("tests/gpu/test_triton_kernels.py", "-k", "narrow and few and float16 and int2")
SPREAD = ("-n", "logical", "--maxprocesses", "16") if find_spec("xdist") else ()  # compiling takes most of the time
SANITIZER = "compute-sanitizer"


class Run(NamedTuple):
    """Some tests, and the seconds after which they have hung."""

    name: str
    arguments: tuple[str, ...]
    limit: int
    sanitized: bool = False


RUNS = (
    Run("copier", ("tests/gpu/test_cuda_copier.py",), 60),
    Run("kernels", ("tests/gpu/test_triton_kernels.py", *SPREAD), 270),
    Run("graphs", ("tests/gpu/test_graphs.py",), 150),
    Run("memcheck", SMALL, 90, sanitized=True),
)


def run(out: Path) -> Iterator[dict[str, Any]]:
    """A row for each: what came of it, and in which file its output lies."""
    if find_spec("pytest") is None:
        yield {"tests": "all", "outcome": "not run: pytest is not installed; docs/gpu.md says how to bring it along"}
        return
    for each in RUNS:
        command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *each.arguments]
        if each.sanitized and shutil.which(SANITIZER) is None:
            yield {"tests": each.name, "outcome": f"not run: {SANITIZER} is not on the path"}
            continue
        prefix = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9"] if each.sanitized else []
        yield _row(each, [*prefix, *command], out / f"gpu-tests-{each.name}.txt")


def _row(each: Run, command: list[str], log: Path) -> dict[str, Any]:
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as written:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, timeout=each.limit)
            outcome = "passed" if code.returncode == 0 else f"exit status {code.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {each.limit} seconds"
    seconds = time.monotonic() - began
    return {"tests": each.name, "outcome": outcome, "summary": summary(log), "seconds": seconds, "log": log.name}


def summary(log: Path) -> str:
    """The last line in which pytest counts its tests, without its ornaments."""
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    counted = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return counted[-1] if counted else ""
