"""Ten minutes on one GPU: is it right, how fast is a layer, what do promotions cost, how fast is a model.

python benchmarks/gpu/gpu.py [--quick] [--only-model] [--num-layers 48] [--out DIRECTORY]

Nothing is timed before every kernel agrees with the reference. Figures go to gpu-<name>.json and .md in the directory,
and gpu-overlap-trace.json shows copies beside kernels in chrome://tracing.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent.parent / "results"))


def main(
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes of the first model only.")] = False,
    only_model: Annotated[bool, typer.Option("--only-model", help="Check the kernels, time whole models.")] = False,
    num_layers: Annotated[int, typer.Option(help="Layers of the whole model, which has 48.")] = 48,
) -> None:
    """Check and time the CUDA path on the GPU of this machine."""
    if not torch.cuda.is_available():
        typer.echo("this benchmark needs a CUDA device, and PyTorch finds none; the CPU has benchmarks of its own")
        raise typer.Exit(1)
    import gpu_layers  # only now: on a CPU there is nothing to set up
    import gpu_model
    import gpu_moves
    import triton

    torch.manual_seed(0)
    models = gpu_layers.MODELS[:1] if quick else gpu_layers.MODELS
    for shape in models:
        gpu_layers.check(shape)
        typer.echo(f"{shape.name}: every mix agrees with the reference")
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": gpu_layers.ceilings(),
        "layers": [],
    }
    write(found, out)
    tokens = (1, 8, 32, 2048) if quick else gpu_layers.BATCHES + gpu_layers.PROMPTS
    for shape in () if only_model else models:
        found["layers"] += gpu_layers.times(shape, tokens)
        write(found, out)  # as it goes: what a time limit cuts off is then the end only
    if not only_model:
        found |= gpu_moves.run(steps=200 if quick else 2000)
        write(found, out)
    device, layers, steps = torch.device("cuda", 0), 4 if quick else num_layers, 100 if quick else 500
    found |= gpu_model.run(gpu_model.Workload(device, layers, steps, gpu_model.QWEN3_30B), out)
    typer.echo(write(found, out))


def write(found: dict[str, Any], out: Path) -> str:
    """Write the figures so far; the markdown is returned."""
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + found["gpu"].lower().replace(" ", "-")
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    parts = [f"# {found['gpu']}, PyTorch {found['torch']}, Triton {found['triton']}", table([found["ceilings"]])]
    models = dict.fromkeys(row["model"] for row in found["layers"])
    for model in models:
        rows = [row for row in found["layers"] if row["model"] == model]
        parts += [f"## {model}: microseconds per layer, by tokens", table(by_tokens(rows))]
    for title in ("link", "swapping", "model", "overlap"):
        if title in found:
            parts += [f"## {title}", table(found[title])]
    text = "\n\n".join(parts) + "\n"
    (out / f"{name}.md").write_text(text)
    return text


def by_tokens(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each way to run a layer, one column for each number of tokens; * where it was not captured."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        mark = "" if row["captured"] else " *"
        lines.setdefault(row["what"], {})[str(row["tokens"])] = f"{row['microseconds']:.0f}{mark}"
    return [{"": what, **cells} for what, cells in lines.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as markdown; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
