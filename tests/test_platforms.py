"""A system that lacks what Linux has: everything is imported and works through PyTorch, and says what it lacks."""

import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent / "helpers"

# What `os` and the library have on Linux and not on Windows, as far as anything here could ask for it.
WITHOUT = """
import os, sys
import torch, transformers, accelerate, safetensors, psutil, tqdm, rich, typer, huggingface_hub
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for name in (
    "preadv", "pread", "pwrite", "pwritev", "posix_fallocate", "posix_fadvise", "geteuid", "getuid", "fchmod",
    "fchown", "chown", "fork", "register_at_fork", "killpg", "setsid", "sched_getaffinity", "sched_setaffinity",
    "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "uname", "mkfifo",
):
    if hasattr(os, name):
        delattr(os, name)
from types import SimpleNamespace
sys.modules["msvcrt"] = SimpleNamespace(LK_NBLCK=2, locking=lambda file, mode, nbytes: None)
"""

WORK = """
import importlib, pkgutil, tempfile
sys.path.insert(0, HELPERS)
import dynaexq
for module in pkgutil.walk_packages(dynaexq.__path__, "dynaexq."):
    if ".triton" not in module.name and "_dynaexq_startup" not in module.name:
        importlib.import_module(module.name)
import tiny
from dynaexq.kernels.cpu import build
build.cpu_features = lambda: frozenset()  # there is no /proc/cpuinfo
model = tiny.tiny_qwen3_moe(torch.float32)
runtime = dynaexq.patch(model, "1GiB", tiers=("int4", "int8"), host_copy="disk")
answer = tiny.logits(model)
runtime.tick()
with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    with runtime.trace(directory + "/trace.npz"):
        tiny.logits(model)
        runtime.tick()
    runtime.save_hotness(directory + "/hotness.safetensors")
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(tiny.logits(again), answer)
    again.dynaexq.load_hotness(directory + "/hotness.safetensors")
    from dynaexq.hf.convert import quantize_checkpoint
    tiny.tiny_qwen3_moe().save_pretrained(directory + "/plain")
    quantize_checkpoint(directory + "/plain", directory + "/packed", dynaexq.DynaExqConfig(tiers=("int2", "int8")))
    AutoModelForCausalLM.from_pretrained(directory + "/packed").dynaexq.close()
    again.dynaexq.close()
runtime.close()
print("done")
"""


def test_without_what_windows_lacks_everything_is_imported_and_works() -> None:
    program = WITHOUT + WORK.replace("HELPERS", repr(str(HELPERS)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]
    assert "no native CPU kernel, experts run through PyTorch instead" in done.stderr


CALLS = """
from dynaexq.cli.app import app
made_up = ["--generate", "flat", "--tokens", "64", "--phases", "1", "--upgraded", "0.2", "--tiers", "int2,int4"]
for arguments in (["plan", CONFIG, "--hbm-budget", "1GiB"], ["simulate", *made_up]):
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, end
"""


def test_the_command_line_plans_and_simulates_there() -> None:
    config = Path(__file__).parents[1] / "examples" / "tiny-moe"
    program = WITHOUT + CALLS.replace("CONFIG", repr(str(config)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
