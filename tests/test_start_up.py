"""What starting costs, in modules that are imported rather than in seconds, so that no machine can make it fail."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import tiny

import dynaexq

HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "triton", "numpy", "safetensors", "rich", "matplotlib"}


def imported_by(statement: str, before: str = "") -> set[str]:
    """The modules that `statement` adds to those of `before`."""
    program = f"import sys\n{before}\nknown = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - known)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_next_to_nothing():
    added = imported_by("import dynaexq", before="import torch, transformers")
    assert {name for name in added if name.startswith("dynaexq")} == {
        "dynaexq", "dynaexq.errors", "dynaexq.hf", "dynaexq.hf.registration",
    }  # fmt: skip
    assert not {name.split(".")[0] for name in added} & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["version"], ["plan", "--help"]], ids=" ".join)
def test_the_command_line_answers_without_pytorch(arguments):
    run = f"sys.argv = {['dynaexq', *arguments]!r}\nimport io, contextlib\nfrom dynaexq.cli.app import app\n"
    added = imported_by(
        f"{run}with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    app()"
    )
    assert not {name.split(".")[0] for name in added} & (HEAVY - {"rich"})


def test_transformers_knows_dynaexq_whichever_is_imported_first():
    for first, second in (("dynaexq", "transformers.quantizers.auto"), ("transformers.quantizers.auto", "dynaexq")):
        program = (
            f"import {first}, {second}\n"
            "from transformers.quantizers.auto import AutoQuantizationConfig, AutoHfQuantizer\n"
            "config = AutoQuantizationConfig.from_dict({'quant_method': 'dynaexq', 'hysteresis': 0.3})\n"
            "print(type(config).__name__, config.hysteresis, type(AutoHfQuantizer.from_config(config)).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["DynaExqConfig", "0.3", "DynaExqQuantizer"]


def test_every_public_name_can_be_had_and_is_listed():
    program = (
        "import dynaexq\nfor name in dynaexq.__all__: getattr(dynaexq, name)\n"
        "print(set(dynaexq.__all__) <= set(dir(dynaexq)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_the_hook_that_runs_at_every_start_of_python_imports_nothing():
    hook = Path(dynaexq.__file__).parent / "hf" / "startup" / "_dynaexq_startup.py"
    assert imported_by(f"exec(open({str(hook)!r}).read(), {{'__name__': 'hook'}})") == set()


def test_the_hook_is_on_its_way_until_transformers_is_asked_for_quantizers():
    hook = Path(dynaexq.__file__).parent / "hf" / "startup" / "_dynaexq_startup.py"
    program = (
        f"import sys; sys.path.insert(0, {str(hook.parents[3])!r})\n"
        f"exec(open({str(hook)!r}).read(), {{'__name__': 'hook'}})\n"
        "import transformers; print('dynaexq' in sys.modules)\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; print('dynaexq' in table)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("kind", ["packed", "annotated"])
def test_a_checkpoint_loads_in_a_program_that_never_imports_dynaexq(kind: str, tmp_path: Path):
    if not is_installed():
        pytest.skip("dynaexq is not installed here: no hook runs when Python starts")
    model = tiny.tiny_qwen3_moe()
    if kind == "packed":
        dynaexq.patch(model, "1MiB")
    else:
        model.config.quantization_config = dynaexq.DynaExqConfig(hbm_budget="1MiB")
    model.save_pretrained(tmp_path)
    program = (
        "from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM\n"
        "for kind in (AutoModelForCausalLM, Qwen3MoeForCausalLM):\n"
        f"    print(kind.from_pretrained({str(tmp_path)!r}).dynaexq.plan.budget)"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.split() == [str(2**20)] * 2, done.stderr


def is_installed() -> bool:
    """Whether this environment has dynaexq, and not only a path that leads to it."""
    try:
        return distribution("dynaexq").version == dynaexq.__version__
    except PackageNotFoundError:
        return False
