"""The structure of the package, counted from the code: packages, floors, arrows; files that a call passes through.

    python benchmarks/structure.py [--package DIRECTORY] [--json FILE]

The walks are counted with `sys.setprofile` on a tiny Qwen3-MoE on the CPU, each the second time it is taken, so that
imports and set-up of the first are left out. `--package` counts another checkout, whose own code then runs.
"""

import ast
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent.parent / "dynaexq"
LAYOUT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def room_of(path: Path, package: Path) -> str:
    """The package directly below `package`, or the module that lies there loose."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def graph(package: Path) -> dict[str, set[str]]:
    """Rooms, and the rooms that each imports; imports for type checkers alone are left out."""
    arrows: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room, tree = room_of(path, package), ast.parse(path.read_text())
        arrows.setdefault(room, set())
        typing_only = {
            node
            for guard in ast.walk(tree)
            if isinstance(guard, ast.If) and getattr(guard.test, "id", "") == "TYPE_CHECKING"
            for node in ast.walk(guard)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node not in typing_only:
                parts = node.module.split(".")
                if parts[0] == package.name and len(parts) > 1 and parts[1] != room:
                    arrows[room].add(parts[1])
    arrows.pop("__init__", None)
    return arrows


def height(arrows: dict[str, set[str]]) -> int:
    """Floors: the longest chain of imports; 0 where they run in a circle."""
    left, floors = dict(arrows), 0
    while left:
        ground = {room for room, below in left.items() if not below & left.keys()}
        if not ground:
            return 0
        left = {room: below for room, below in left.items() if room not in ground}
        floors += 1
    return floors


def lines(package: Path) -> dict[str, dict[str, int]]:
    """Lines of each room, and how many of them are code: neither empty, nor a comment, nor a docstring."""
    found: dict[str, dict[str, int]] = {}
    for path in package.rglob("*.py"):
        text = path.read_text()
        prose = {
            number
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        rows = [(number, row.strip()) for number, row in enumerate(text.splitlines(), 1)]
        room = found.setdefault(room_of(path, package), {"lines": 0, "code": 0})
        room["lines"] += len(rows)
        room["code"] += sum(bool(row) and not row.startswith("#") and number not in prose for number, row in rows)
    return found


def counts(package: Path) -> dict[str, int]:
    """What can be counted without running anything."""
    arrows, by_room = graph(package), lines(package)
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    return {
        "packages": sum((package / room).is_dir() for room in arrows),
        "loose modules": sum(not (package / room).is_dir() for room in arrows),
        "floors": height(arrows),
        "arrows": sum(map(len, arrows.values())),
        "files": len(files),
        "lines": sum(room["lines"] for room in by_room.values()),
        "lines of code": sum(room["code"] for room in by_room.values()),
    }


def passed_through(package: Path, call: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """The result of `call`, and how many files and rooms of the package ran in it."""
    seen: set[Path] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(package)):
            seen.add(Path(frame.f_code.co_filename))

    gc.disable()  # or finalizers of earlier models would be counted
    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return result, {"files": len(seen), "rooms": len({room_of(path, package) for path in seen})}


def walks(package: Path) -> dict[str, dict[str, int]]:
    """Files and rooms that four calls pass through."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    import dynaexq

    torch.set_num_threads(1)
    ids, tiers = torch.arange(24).view(2, 12), ("int2", "int4")

    def model() -> Any:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**LAYOUT)).to(torch.bfloat16).eval()

    def patch() -> Any:
        return dynaexq.patch(model(), "1MiB", tiers=tiers, device="cpu")

    found = {}
    patch()
    _, found["patch"] = passed_through(package, patch)
    live = model()
    dynaexq.patch(live, "1MiB", tiers=tiers, device="cpu")
    with torch.no_grad():
        live(ids)
        _, found["one forward"] = passed_through(package, lambda: live(ids))
    with tempfile.TemporaryDirectory() as directory:
        found["one tick"] = tick_walk(package, model(), Path(directory))
    with tempfile.TemporaryDirectory() as directory:
        live.save_pretrained(directory)
        AutoModelForCausalLM.from_pretrained(directory)
        _, found["from_pretrained, packed"] = passed_through(
            package, lambda: AutoModelForCausalLM.from_pretrained(directory)
        )
    return found


def tick_walk(package: Path, model: Any, directory: Path) -> dict[str, int]:
    """Files and rooms of a tick in which experts change places."""
    import torch
    from transformers import AutoModelForCausalLM

    import dynaexq

    model.save_pretrained(directory)
    least = 142_000  # room for the base and for a few upgrades
    config = dynaexq.DynaExqConfig(hbm_budget=least, tiers=("int2", "int4"), auto_pause=False, half_life=1)
    live = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    found = {"files": 0, "rooms": 0}
    for start in range(6):
        with torch.no_grad():
            live(torch.arange(10 * start, 10 * start + 4)[None])
        before = live.dynaexq.stats()["promotions"]
        _, walk = passed_through(package, live.dynaexq.tick)
        if live.dynaexq.stats()["promotions"] > before:
            found = walk
    return found


def main(
    package: Annotated[Path, typer.Option(help="The package to count.")] = HERE,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Count the structure of a checkout, and walk through it."""
    package = package.resolve()
    sys.path.insert(0, str(package.parent))
    found = {"counts": counts(package), "lines by room": lines(package), "walks": walks(package)}
    table = Table(box=None, header_style="bold")
    for column in ("", "files", "rooms"):
        table.add_column(column)
    for name, walk in found["walks"].items():
        table.add_row(name, str(walk["files"]), str(walk["rooms"]))
    console = Console()
    console.print(", ".join(f"{count} {name}" for name, count in found["counts"].items()))
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
