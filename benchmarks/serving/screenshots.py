"""Pictures of what people look at: the server's live page, a report in a notebook, dynaexq top, and plots.

    python benchmarks/serving/screenshots.py [--out docs/pictures] [--json FILE]

A server of the embedded model answers prose, code and sums in turn, and Chromium, without a window, opens what there
is to see; then one kind comes after the other, and what the server shows is plotted. It needs the extras serve and
plots, openai and a Chromium (`apt-get install chromium`).
"""

import io
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from load import Server, budget_of, load, prompts
from rich.console import Console

import dynaexq
from dynaexq import plots
from dynaexq.cli.demo import embedded_model
from dynaexq.cli.demo_corpus import DOMAINS
from dynaexq.hf.convert import quantize_checkpoint
from dynaexq.views.html import fragment
from dynaexq.views.terminal import SnapshotView

REQUESTS, CLIENTS, COLUMNS = 120, 4, 100
OF_EACH_KIND, LAYER = 20, 2
PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str:
    """The path of a Chromium."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise typer.BadParameter(f"no browser found, looked for {', '.join(BROWSERS)}")
    return found


def photograph(address: str, path: Path, width: int, height: int, dark: bool = False) -> None:
    """Have the browser open `address`, wait for its scripts, and write a PNG."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    options += [f"--window-size={width},{height}", f"--screenshot={path}"]
    subprocess.run([browser(), *options, address], check=True, capture_output=True, timeout=120)


def in_a_notebook(snapshot: dict[str, Any], dark: bool) -> str:
    """A page with the report as a notebook shows it, below the call that made it."""
    colors = "background:#111;color:#ddd" if dark else "background:#fff;color:#222"
    call = "<pre>In [3]: model.dynaexq.report()</pre>"
    return f'<!doctype html><meta charset="utf-8"><body style="margin:24px;{colors}">{call}{fragment(snapshot)}</body>'


def in_a_terminal(snapshot: dict[str, Any]) -> str:
    """A page with what `dynaexq top` prints."""
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=io.StringIO())
    console.print(SnapshotView(snapshot))
    drawing = console.export_svg(title="dynaexq top")
    return f'<!doctype html><meta charset="utf-8"><body style="margin:0">{drawing}</body>'


def shifted(server: Server) -> list[dict[str, Any]]:
    """What the server shows after each of its answers, while one kind of request follows the other."""
    snapshots = []
    for kind in range(len(DOMAINS)):
        for prompt in prompts(REQUESTS)[kind :: len(DOMAINS)][:OF_EACH_KIND]:
            server.seconds_for(prompt)
            snapshots.append(server.snapshot())
    return snapshots


def plot(snapshots: list[dict[str, Any]], out: Path) -> None:
    """The pictures of `dynaexq.plots` of snapshots."""
    over_time = plots.precision_over_time(snapshots, LAYER)
    over_time.axes[0].set(xlabel=f"request: {OF_EACH_KIND} each of {', '.join(DOMAINS)}", title=f"layer {LAYER}")
    figures = {
        "precision-over-time": over_time,
        "hotness": plots.hotness_map(snapshots[-1]),
        "coverage": plots.coverage(snapshots[-1]),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="Directory for the PNG files.")] = PICTURES,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the pictures' names and sizes here.")] = None,
) -> None:
    """Serve, ask, and take the pictures."""
    browser()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        packed, page = Path(scratch) / "packed", Path(scratch) / "page.html"
        quantize_checkpoint(embedded_model(), packed, dynaexq.DynaExqConfig(tiers=("int2", "int4")))
        server = Server(packed, budget_of(packed), "none")
        load(server, prompts(REQUESTS), CLIENTS)
        photograph(f"{server.url}/dynaexq", out / "live-page.png", 1200, 1120)
        snapshot = server.snapshot()
        for name, content, size in (
            ("notebook-light", in_a_notebook(snapshot, dark=False), (1200, 1150)),
            ("notebook-dark", in_a_notebook(snapshot, dark=True), (1200, 1150)),
            ("top", in_a_terminal(snapshot), (1240, 1100)),
        ):
            page.write_text(content, encoding="utf-8")
            photograph(page.as_uri(), out / f"{name}.png", *size)
        plot(shifted(server), out)
        server.end()
    sizes = {path.name: path.stat().st_size for path in sorted(out.glob("*.png"))}
    print(f"{len(sizes)} pictures in {out}")
    if json_path:
        json_path.write_text(json.dumps(sizes, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
