"""Quality per byte: who should get the upgrades, what each part of that brings, and whether a mix beats one precision.

    python benchmarks/quality/quality.py [--model DIR] [--tokens 10000] [--only policies,parts] [--json FILE]

KL divergence from the model in its own dtype, nats per token, on a stream of held-out prose, code and arithmetic, one
forward for each window of 128 tokens, with the control loop deciding after every window. Everybody starts from the
same calibration text, which comes from elsewhere.
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from quality_bytes import equal_bytes
from quality_policies import Contest, HotnessAlone, bounds, compete
from rich.console import Console
from rich.table import Table
from streams import Hotness, Stream, use_one_thread
from tqdm import tqdm

import dynaexq
from dynaexq.cli.demo import embedded_model

SHARES = (0.05, 0.1, 0.2, 0.3)
TIER_CHOICES = (("int2", "int4"), ("int4", "int8"), ("int4", "fp16"), ("int2", "fp16"))
PROMPT_AND_STEPS = (512, *[16] * 32)
PARTS: dict[str, dict[str, Any]] = {
    "dynaexq": {},
    "one moving average": {"num_kinds": 1},
    "one moving average, hysteresis 0.5": {"num_kinds": 1, "hysteresis": 0.5},
    "four kinds": {"num_kinds": 4},
    "layers get equal shares": {"allocation": "per_layer"},
    "half-life 32 tokens": {"half_life": 32},
    "half-life 64 tokens": {"half_life": 64},
    "half-life 64 tokens, hysteresis 1": {"half_life": 64, "hysteresis": 1.0},
    "half-life 256 tokens": {"half_life": 256},
    "half-life 512 tokens, hysteresis 0.1": {"half_life": 512, "hysteresis": 0.1},
    "hysteresis 0": {"hysteresis": 0.0},
    "hysteresis 0.5": {"hysteresis": 0.5},
    "hysteresis 1": {"hysteresis": 1.0},
    "never paused": {"auto_pause": False},
    "never paused, hotness alone": {"policy": HotnessAlone()},
    "no warm start": {"warm": False},
    "decides every 4th window": {"update_interval": 4},
}
Row = dict[str, Any]


def policies(stream: Stream, hotness: Hotness) -> list[Row]:
    """int4 over a fifth of int2: every policy, the paper's at many settings."""
    contest = Contest(stream, TIER_CHOICES[0], 0.2, hotness)
    return compete(contest, *bounds(contest), sweep=True)


def parts(stream: Stream, hotness: Hotness) -> list[Row]:
    """The same, with one part of dynaexq changed at a time."""
    contest = Contest(stream, TIER_CHOICES[0], 0.2, hotness)
    return [contest.run(name, **options) for name, options in tqdm(PARTS.items(), desc="parts", unit="option")]


def pairs(stream: Stream, hotness: Hotness) -> list[Row]:
    """Every pair and share of upgraded experts, over one cycle of the workloads."""
    rows, stream = [], stream.first_cycle()
    for tiers in TIER_CHOICES:
        contest = Contest(stream, tiers, 0.0, hotness)
        low, high = bounds(contest)
        for share in SHARES:
            found = compete(replace(contest, share=share), dict(low), dict(high))
            rows += [{"pair": " < ".join(tiers), "upgraded": share} | row for row in found]
    return rows


def calibrated(stream: Stream, hotness: Hotness) -> list[Row]:
    """int4 over a fifth of int2, every policy on calibrated codes, as `--calibrate self` makes them."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "moments.safetensors"
        dynaexq.calibrate(stream.model, path)
        contest = Contest(stream, TIER_CHOICES[0], 0.2, hotness, {"calibration": str(path)})
        return compete(contest, *bounds(contest))


def prompts(path: Path, tokens: int) -> list[Row]:
    """Long prompts and short continuations: time counted in tokens against the paper's factor a step."""
    stream = Stream(path, tokens, lengths=PROMPT_AND_STEPS)
    contest = Contest(stream, TIER_CHOICES[0], 0.2, stream.hotness())
    options: list[Row] = [{}, *({"alpha": alpha} for alpha in (0.5, 0.8, 0.9, 0.95, 0.98))]
    return [
        contest.run(", ".join(f"{name} {value}" for name, value in option.items()) or "half-life 128 tokens", **option)
        | {"tokens a phase": stream.tokens_a_phase}
        for option in tqdm(options, desc="prompts", unit="option")
    ]


def show(console: Console, title: str, rows: list[Row]) -> None:
    """Print rows of the same columns; lists and mappings stay in the JSON."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, list | dict)]
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_shown(column, row[column]) for column in columns))
    console.print(table)


def _shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0%}" if column.startswith(("of low", "of frozen", "coverage", "upgraded")) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each phase.")] = 10_000,
    cycles: Annotated[int, typer.Option(help="Times that every workload comes.")] = 2,
    only: Annotated[str, typer.Option(help="Which tables.")] = "policies,calibrated,parts,prompts,pairs,bytes",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here; other tables there stay.")
    ] = None,
) -> None:
    """Measure the tables, and print them."""
    use_one_thread()
    stream = Stream(model or embedded_model(), tokens, cycles)
    hotness, console = stream.hotness(), Console()
    results: dict[str, Any] = {"torch": torch.__version__}
    wanted = only.split(",")
    for name, title, measure in (
        ("policies", "int4 over a fifth of int2", policies),
        ("calibrated", "int4 over a fifth of int2, calibrated", calibrated),
        ("parts", "int4 over a fifth of int2, one part changed at a time", parts),
        ("pairs", "every pair and share", pairs),
    ):
        if name in wanted:
            results[name] = measure(stream, hotness)
            show(console, title, results[name])
    if "prompts" in wanted:
        results["prompts"] = prompts(model or embedded_model(), tokens)
        show(console, "prompts of 512 tokens, then 32 windows of 16", results["prompts"])
    if "bytes" in wanted:
        rows, uniforms = equal_bytes(stream, hotness)
        results["bytes"], results["uniform"] = rows, [{**vars(u)} for u in uniforms]
        show(console, "equal bytes", rows)
        show(console, "uniform", [{"assignment": u.name, "bits": u.bits, "KL": u.kl} for u in uniforms])
    if json_path:
        before = json.loads(json_path.read_text()) if json_path.exists() else {}
        lengths = before.get("tokens_a_phase", {}) | dict.fromkeys(set(wanted) - {"prompts"}, stream.tokens_a_phase)
        results["tokens_a_phase"] = lengths
        json_path.write_text(json.dumps(before | results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
