"""What is installed elsewhere: all of the package, the embedded model, and the hook beside the package."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
BESIDE = {"_dynaexq_startup.py", "dynaexq.pth"}


def test_a_wheel_has_all_modules_the_model_and_the_hook(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("dynaexq.pth").decode().split() == ["import", "_dynaexq_startup"]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "dynaexq").rglob("*.py")}
    assert {name for name in ours if "/startup/" not in name} | BESIDE <= names
    model = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {f"dynaexq/tiny-moe/{name}" for name in model} <= names
    assert any(name.startswith("dynaexq/kernels/cpu/src/") for name in names)


def test_a_wheel_of_a_platform_has_a_kernel_for_every_instruction_set_and_nothing_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes them, without its compiler, which takes a minute a library."""
    loader = SourceFileLoader("wheels", str(ROOT / ".ci" / "wheels"))
    wheels = module_from_spec(spec_from_loader("wheels", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(wheels)

    def run(*command: str | Path, cwd: Path = ROOT) -> None:
        if "ziglang" in command:
            assert Path(command[-3]).is_file(), "the source that is compiled"
            Path(command[-1]).write_bytes(b"a library")
        elif "hatchling" in command:
            subprocess.run(command, cwd=cwd, check=True, capture_output=True)
        else:
            assert f"manylinux2014_{machine}" in command

    monkeypatch.setattr(wheels, "run", run)
    for machine, sets in {
        "x86_64": ("avx512bf16", "avx512vnni", "avx512", "avx2"),
        "aarch64": ("neoni8mm", "neon"),
    }.items():
        wheels.make(machine, tmp_path / machine, tmp_path / f"tree of {machine}")
        with ZipFile(next((tmp_path / machine).glob("*.whl"))) as wheel:
            names = set(wheel.namelist())
        assert {f"dynaexq/kernels/cpu/lib/moe-{name}.so" for name in sets} <= names
        ours = {str(path.relative_to(ROOT)) for path in (ROOT / "dynaexq").rglob("*.py")}
        assert {name for name in ours if "/startup/" not in name} | BESIDE <= names
