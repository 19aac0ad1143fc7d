"""A first day on a GPU, in calls that are meant to take ten minutes at most: is it right, and how fast is it?

    python benchmarks/gpu/gpu.py tests       the tests of tests/gpu, some of them under compute-sanitizer
    python benchmarks/gpu/gpu.py layers      one layer of experts beside Transformers' own
    python benchmarks/gpu/gpu.py moves       promotions: the link, and what they do to decoding
    python benchmarks/gpu/gpu.py model       a whole model of the shape of Qwen3-30B-A3B, static and dynamic
    python benchmarks/gpu/gpu.py generate    generate() beside the 16-bit model
    python benchmarks/gpu/gpu.py tune        a layer with other tiles than the card's
    python benchmarks/gpu/gpu.py long        minutes of moves: memory, and every byte of every upgrade
    python benchmarks/gpu/gpu.py all --dry-run

No kernel is timed before it agrees with the reference. Each call writes gpu-CARD-CALL.json and .md as it goes, so what
a time limit cuts off is the end only. With --dry-run everything runs on a CPU in toy sizes, in a minute.
"""

import json
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import gpu_generate
import gpu_layers
import gpu_long
import gpu_model
import gpu_moves
import gpu_tests
import gpu_tune
import random_model
import torch
import typer

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent.parent / "results"))


class Bench:
    """Where it runs and in which sizes, and what was found so far.

    Args:
        quick: a few sizes of the first model, four layers of a whole one.
        dry: on a CPU, in sizes that take no time.
        num_layers: of a whole model.
    """

    def __init__(self, call: str, out: Path, quick: bool, dry: bool, num_layers: int = 48):
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self.call, self.out, self.quick, self.dry = call, out, quick, dry
        self._num_layers = 4 if quick else num_layers
        self.found: dict[str, Any] = {"gpu": card(self.device), **versions()}

    def add(self, title: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows as they come, and write them down."""
        self.found.setdefault(title, [])
        for row in rows:
            self.found[title].append(row)
            write(self.found, self.call, self.out)

    @property
    def shapes(self) -> tuple[gpu_layers.Shape, ...]:
        """Layers of experts."""
        if self.dry:
            return (gpu_layers.TOY,)
        return gpu_layers.MODELS[:1] if self.quick else gpu_layers.MODELS

    @property
    def sizes(self) -> dict[str, Any]:
        """Of a whole model."""
        if self.dry:
            return {**random_model.TOY, "num_hidden_layers": 2}
        return {**random_model.QWEN3_30B, "num_hidden_layers": self._num_layers}

    def either(self, dry: Any, quick: Any, full: Any) -> Any:
        """What suits how it is run."""
        return dry if self.dry else quick if self.quick else full


def card(device: torch.device) -> str:
    """The name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, dry run"


def versions() -> dict[str, str]:
    """What the figures depend on."""
    try:
        import triton
    except ImportError:  # it is for Linux
        return {"torch": torch.__version__, "triton": "none"}
    return {"torch": torch.__version__, "triton": triton.__version__}


def run_tests(bench: Bench) -> None:
    """See `gpu_tests`."""
    bench.add("tests", gpu_tests.run(bench.out))


def run_layers(bench: Bench) -> None:
    """See `gpu_layers`."""
    for shape in bench.shapes:
        gpu_layers.check(shape, bench.device)
        typer.echo(f"{shape.name}: every mix agrees with the reference")
    nbytes, width = bench.either((2**16, 64), (2**30, 8192), (2**30, 8192))
    bench.add("ceilings", [gpu_layers.ceilings(bench.device, nbytes, width)])
    tokens = bench.either((1, 16), (1, 8, 32, 2048), gpu_layers.BATCHES + gpu_layers.PROMPTS)
    for shape in bench.shapes:
        bench.add("layers", gpu_layers.times(shape, tokens, bench.device))


def run_moves(bench: Bench) -> None:
    """See `gpu_moves`."""
    for title, rows in gpu_moves.run(bench.shapes[0], bench.either(8, 200, 2000), bench.device):
        bench.add(title, rows)


def run_model(bench: Bench) -> None:
    """See `gpu_model`."""
    sizes, steps = bench.sizes, bench.either(8, 100, 500)
    workload = gpu_model.Workload(bench.device, steps, sizes, *bench.either([(1, 2), (8,)], [], []))
    for title, rows in gpu_model.run(workload, bench.out):
        bench.add(title, rows)


def run_generate(bench: Bench) -> None:
    """See `gpu_generate`."""
    batches, tokens = bench.either(((1,), 4), ((1,), 128), ((1, 8), 256))
    tiers = gpu_model.TIERS[:1] if bench.quick else gpu_model.TIERS
    bench.add("generate", gpu_generate.run(bench.sizes, tiers, batches, tokens, bench.device))


def run_tune(bench: Bench) -> None:
    """See `gpu_tune`."""
    tokens = bench.either((8,), (1, 32), (1, 8, 32, 128))
    bench.add("tune", gpu_tune.run(bench.shapes[0], tokens, bench.device))


def run_long(bench: Bench) -> None:
    """See `gpu_long`."""
    for tiers in gpu_model.TIERS:
        bench.add("long", [gpu_long.run(bench.sizes, tiers, bench.either(0, 20, 200), bench.device)])


RUNNERS: dict[str, Callable[[Bench], None]] = {
    "tests": run_tests,
    "layers": run_layers,
    "moves": run_moves,
    "model": run_model,
    "generate": run_generate,
    "tune": run_tune,
    "long": run_long,
}
"""The calls, in the order of a first day."""


def main(
    call: Annotated[str, typer.Argument(help=f"One of {', '.join(RUNNERS)}, or all.")],
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes of the first model only.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On a CPU, in toy sizes.")] = False,
    num_layers: Annotated[int, typer.Option(help="Layers of the whole model, which has 48.")] = 48,
) -> None:
    """Check and time the CUDA path on the GPU of this machine."""
    if call not in (*RUNNERS, "all"):
        raise typer.BadParameter(f"there is no call {call!r}; there are {', '.join(RUNNERS)}, and all")
    if not dry_run and not torch.cuda.is_available():
        typer.echo("this benchmark needs a CUDA device, and PyTorch finds none; try --dry-run, or those for the CPU")
        raise typer.Exit(1)
    torch.manual_seed(0)
    if dry_run:
        torch.set_num_threads(1)  # toys gain nothing by more, and beside other work they lose much
    names = tuple(RUNNERS) if call == "all" else (call,)
    went_well = [run(Bench(name, out, quick, dry_run, num_layers)) for name in names]
    raise typer.Exit(not all(went_well))


def run(bench: Bench) -> bool:
    """One call. What goes wrong is a row of its figures, so that the next call, and those before, are not lost."""
    try:
        RUNNERS[bench.call](bench)
    except Exception as error:
        traceback.print_exc()
        bench.add("wrong", [{"call": bench.call, "error": f"{type(error).__name__}: {error}"}])
    typer.echo(write(bench.found, bench.call, bench.out))
    failed = [row for row in bench.found.get("tests", ()) if not row["outcome"].startswith(("passed", "not run"))]
    return not failed and "wrong" not in bench.found


def write(found: dict[str, Any], call: str, out: Path) -> str:
    """Write the figures so far; the markdown is returned."""
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + found["gpu"].lower().replace(",", "").replace(" ", "-") + f"-{call}"
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    parts = [f"# {found['gpu']}, PyTorch {found['torch']}, Triton {found['triton']}"]
    for title, rows in found.items():
        if title == "layers":
            for model in dict.fromkeys(row["model"] for row in rows):
                one = [row for row in rows if row["model"] == model]
                parts += [f"## {model}: microseconds per layer, by tokens", table(by_tokens(one))]
        elif isinstance(rows, list):
            parts += [f"## {title}", table(rows)]
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
