"""Every example runs as it stands, offline, and prints something that a reader understands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SAYS = {
    "patch": "unpatched: a Qwen3MoeForCausalLM",
    "from_pretrained": "experts hold the upgrade at a time",
    "pack_and_reload": "the reloaded model answers with the same bits: True",
    "shifting_workload": "arithmetic:",
    "trace_and_simulate": "of the removable error",
    "custom_policy": "upgraded experts per layer:",
    "evaluate_your_text": "nats per token",
}


def test_each_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[name] in done.stdout
