"""Seconds of fresh processes: what importing dynaexq adds to PyTorch and Transformers, and short commands.

    python benchmarks/start_up.py [--package DIRECTORY] [--repeats 5] [--json FILE]

`--package` times another checkout, of this layout or the one before. The model that is planned is Qwen3-30B-A3B, from
its published configuration.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent.parent / "dynaexq"
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


def programs(package: Path, model: Path) -> dict[str, list[str]]:
    """What is timed, as arguments of the interpreter."""
    module = "dynaexq.cli.app" if (package / "cli").is_dir() else "dynaexq.cli"
    command = ["-c", f"from {module} import main; main()"]
    return {
        "import torch, transformers": ["-c", "import torch, transformers"],
        "import torch, transformers, dynaexq": ["-c", "import torch, transformers, dynaexq"],
        "dynaexq --help": [*command, "--help"],
        "dynaexq version": [*command, "version"],
        "dynaexq plan": [*command, "plan", str(model)],
    }


def seconds(arguments: list[str], package: Path) -> float:
    """How long one fresh interpreter takes, outside of any checkout."""
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=tempfile.gettempdir(), check=True, capture_output=True
    )
    return time.perf_counter() - begin


def main(
    package: Annotated[Path, typer.Option(help="The package to time.")] = HERE,
    repeats: Annotated[int, typer.Option(help="Processes of each kind, in turns, after one that is not timed.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time processes that should start quickly."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(QWEN3_30B))
        kinds = programs(package.resolve(), Path(directory))
        rounds = [
            {name: seconds(arguments, package.resolve()) for name, arguments in kinds.items()}
            for _ in range(repeats + 1)
        ]
    found = {name: statistics.median(timed[name] for timed in rounds[1:]) for name in kinds}
    table = Table("process", "median s", box=None, header_style="bold")
    for name, figure in found.items():
        table.add_row(name, f"{figure:.2f}")
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
