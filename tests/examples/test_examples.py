"""Every example runs as it stands, offline, and prints something that a reader understands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from dynaexq.hf.compat import has_parallel_plans

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SAYS = {
    "patch": "unpatched: a Qwen3MoeForCausalLM",
    "from_pretrained": "experts hold the upgrade at a time",
    "pack_and_reload": "the reloaded model answers with the same bits: True",
    "shifting_workload": "arithmetic:",
    "trace_and_simulate": "of the removable error",
    "custom_policy": "upgraded experts per layer:",
    "evaluate_your_text": "nats per token",
    "expert_parallel": "one process: 9,215,808 bytes",
}


def test_each_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAYS, "gradio_chat", "ray_serve"}


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name):
    assert SAYS[name] in run(str(EXAMPLES / f"{name}.py"))


@pytest.mark.skipif(not has_parallel_plans(), reason="needs Transformers 5.21")
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_answer_as_one_process_does(ranks, tmp_path):
    for file in (EXAMPLES / "tiny-moe").glob("*token*.json"):
        shutil.copy(file, tmp_path)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    tiny.tiny_qwen3_moe(torch.float32, vocab_size=2048, **heads).save_pretrained(tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0", "--standalone")
    said = run(*torchrun, str(EXAMPLES / "expert_parallel.py"), str(tmp_path))
    assert sorted(re.findall(r"rank (\d) of (\d): [\d,]+ bytes, the same answer: True", said)) == [
        (str(rank), str(ranks)) for rank in range(ranks)
    ]


def run(*arguments):
    """What a program prints, which ends well."""
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
