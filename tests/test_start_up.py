"""What starting costs, in modules that are imported rather than in seconds, so that no machine can make it fail."""

import subprocess
import sys

import pytest

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
