"""What the scripts of the figures share: a model at any precision, the text it reads, files and pictures.

It measures nothing. Pictures are drawn from the very figures that are written as JSON, and need matplotlib.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dynaexq
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import DOMAINS, documents
from dynaexq.evaluate import windows_of
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.model_size import inspect_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent.parent / "results"))

Model = Annotated[Path, typer.Option(help="Checkpoint directory, by default the embedded model.")]
Device = Annotated[str, typer.Option(help='"cpu" or "cuda"; by default the accelerator if there is one.')]
Threads = Annotated[int, typer.Option(help="Threads of PyTorch.")]
Out = Annotated[Path, typer.Option(help="Directory for the JSON and the picture.")]
Texts = Annotated[list[str] | None, typer.Option("--text", metavar="NAME=FILE", help="A workload; may be repeated.")]
Tiers = Annotated[str, typer.Option(help="Base and upgrade, such as int2,int4.")]
Upgraded = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the experts with a slot for an upgrade.")]

EMBEDDED = embedded_model()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def budget(path: Path, tiers: Sequence[str], share: float) -> int:
    """Bytes of all weights with `share` of the experts upgraded, from the configuration alone."""
    spec = inspect_checkpoint(path, DynaExqConfig(tiers=tuple(tiers)))
    (base, upgrade), *_ = spec.choices
    slots = round(share * spec.num_layers * spec.num_experts)
    return spec.weights(base) + (slots * upgrade.nbytes if upgrade else 0)


def original(path: Path, device: str, implementation: str = "eager") -> PreTrainedModel:
    """The model in its own dtype, unpatched; the eager experts are the ones that a tier `fp16` equals to the bit."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map=device, experts_implementation=implementation
    )
    return model.eval()


def patched(path: Path, device: str, tiers: Sequence[str], share: float, **options: Any) -> PreTrainedModel:
    """The model with a slot for `share` of its experts on the pair `tiers`; the 16-bit experts are never held."""
    config = dynaexq.DynaExqConfig(
        hbm_budget=budget(path, tiers, share), tiers=tuple(tiers), **{"device": device} | options
    )
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", quantization_config=config).eval()


def workloads(
    path: Path, texts: Iterable[str] | None, count: int, length: int, device: str
) -> dict[str, list[Tensor]]:
    """`count` windows of `length` token ids of every workload: of `texts` ("NAME=FILE"), or of the built-in corpus.

    Raises:
        typer.BadParameter: a text that is not NAME=FILE, or that is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    sources = dict(map(_named, texts)) if texts else {domain: documents(domain) for domain in DOMAINS}
    found = {name: windows_of(tokenizer, source, count, length) for name, source in sources.items()}
    for name, windows in found.items():
        if len(windows) < count:
            raise typer.BadParameter(
                f"{name} fills {len(windows)} windows of {length} tokens, expected {count}; give a longer text, or "
                "ask for less"
            )
    return {name: [window.to(device) for window in windows] for name, windows in found.items()}


def machine(device: str) -> dict[str, Any]:
    """What ran the measurement, and how busy it was at that moment."""
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(out: Path, name: str, results: Any, draw: "Callable[[], Figure]", title: str) -> None:
    """Write `results` as NAME.json, and as NAME.png the figure that `draw()` makes of them, under `title`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    if find_spec("matplotlib") is None:
        typer.echo(f'{name}.json is written; for the picture, pip install "dynaexq[plots]" and run this again')
        return
    figure = draw()
    figure.suptitle(title)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / f"{name}.png", dpi=110)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows as a table on the terminal."""
    table = Table(title=title)
    for column, value in rows[0].items():
        table.add_column(column.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=130).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _named(text: str) -> tuple[str, list[str]]:
    name, equals, file = text.partition("=")
    if not equals or not Path(file).is_file():
        raise typer.BadParameter(f"expected NAME=FILE with a file that exists, got {text!r}")
    return name, [Path(file).read_text(encoding="utf-8")]
