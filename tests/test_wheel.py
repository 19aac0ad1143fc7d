"""What is installed elsewhere: all of the package, the embedded model, and the hook beside the package."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

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
