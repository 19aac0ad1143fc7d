"""The paper's table 1: accuracy on tasks of lm-evaluation-harness, at high, low, static and dynamic precision.

    python benchmarks/figures/table1_accuracy.py [--model DIR] [--device cpu] [--out DIR]
    python benchmarks/figures/table1_accuracy.py --model DIR --task gsm8k --contestants int8,static,dynamic

Needs lm_eval: pip install "dynaexq[benchmarks]". Without --task it writes a task of its own, so that it runs without
a network: arithmetic of `dynaexq.cli.demo_corpus`, the result to be chosen among four. Your tasks: --tasks-dir.

*High* and *low* have every, and no, expert upgraded; *static* keeps the choice made at the start, *dynamic* follows
the tasks, in the order in which they are given. A precision (int2, int4, int8, fp16) can take part by its name: what
dynamic gains counts only against the best uniform precision of the same bytes.
"""

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import figure_helpers as figures
import torch
import typer
from transformers import AutoTokenizer, PreTrainedModel

from dynaexq import plots
from dynaexq.cli.demo_corpus import documents
from dynaexq.types import BITS

OWN_TASK = "dynaexq_arithmetic"
EXERCISE = re.compile(r"(?P<question>.*= )(?P<result>\d+)(?P<rest>\D*)")


def write_own_task(directory: Path, count: int) -> None:
    """The task that needs no network: its YAML and its questions."""
    rng, lines = random.Random(0), []
    for text in documents("arithmetic"):
        lines += [found for line in text.splitlines() if (found := EXERCISE.fullmatch(line))]
        if len(lines) >= count:
            break
    with (directory / "questions.jsonl").open("w") as file:
        for found in lines[:count]:
            right = int(found["result"])
            near = [number for number in range(max(0, right - 10), right + 11) if number != right]
            choices = [right, *rng.sample(near, 3)]
            rng.shuffle(choices)
            answers = [f"{choice}{found['rest']}" for choice in choices]
            # The space belongs to the answer, as the tokenizer would have it.
            question = {"question": found["question"].rstrip(), "choices": answers, "answer": choices.index(right)}
            file.write(json.dumps(question) + "\n")
    (directory / f"{OWN_TASK}.yaml").write_text(
        f"task: {OWN_TASK}\n"
        "dataset_path: json\n"
        "dataset_kwargs:\n"
        f"  data_files: {{test: {json.dumps(str(directory / 'questions.jsonl'))}}}\n"
        f"  cache_dir: {json.dumps(str(directory / 'cache'))}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )


def enter(name: str, path: Path, device: str, tiers: tuple[str, ...], share: float) -> PreTrainedModel:
    """The contestant of this name."""
    if name == "16-bit":
        return figures.original(path, device)
    if name in BITS:
        return figures.patched(path, device, (name,), 0.0)
    shares = {"high": 1.0, "low": 0.0, "static": share, "dynamic": share}
    if name not in shares:
        raise typer.BadParameter(f"expected contestants of 16-bit, {', '.join(shares | BITS)}, got {name!r}")
    return figures.patched(path, device, tiers, shares[name], policy="topn" if name == "dynamic" else "frozen")


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights."""
    runtime = getattr(model, "dynaexq", None)
    return runtime.memory()["total"] if runtime else sum(parameter.nbytes for parameter in model.parameters())


def scores(
    model: PreTrainedModel, tokenizer: Any, tasks: list[str], manager: Any, batch: int, limit: int | None
) -> dict[str, dict[str, float]]:
    """What the harness finds, `{task: {metric: value}}`; one task after the other."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness, found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), {}
    for task in tasks:
        report = simple_evaluate(
            harness, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
        values = report["results"][task].items()
        found[task] = {metric.removesuffix(",none"): value for metric, value in values if isinstance(value, float)}
    return found


def recovered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of the distance between low and high that static and dynamic recover, of every metric."""
    by_name = {row["contestant"]: row for row in rows}
    if not {"high", "low"} <= by_name.keys():
        return []
    high, low = by_name["high"], by_name["low"]
    return [
        {
            "metric": metric,
            "contestant": name,
            "recovered": (by_name[name][metric] - low[metric]) / (high[metric] - low[metric]),
        }
        for metric in metrics_of(rows)
        for name in ("static", "dynamic")
        if name in by_name and high[metric] != low[metric]
    ]


def metrics_of(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that hold figures of the harness, their standard errors left out."""
    return [name for name in rows[0] if ": " in name and "_stderr" not in name]


@torch.no_grad()
def main(
    model: figures.Model = figures.EMBEDDED,
    device: figures.Device = figures.DEVICE,
    tiers: figures.Tiers = "int2,int4",
    upgraded: figures.Upgraded = 0.2,
    task: Annotated[list[str] | None, typer.Option(help="A task of the harness; may be repeated.")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Directory with YAML files of your own tasks.")] = None,
    contestants: Annotated[str, typer.Option(help="Who takes part.")] = "16-bit,high,low,static,dynamic",
    questions: Annotated[int, typer.Option(help="Questions of the built-in task.")] = 1000,
    limit: Annotated[int | None, typer.Option(help="Questions of a task at most.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 8,
    threads: figures.Threads = 1,
    out: figures.Out = figures.RESULTS,
) -> None:
    """Measure accuracy."""
    if find_spec("lm_eval") is None:
        typer.echo('this table needs lm-evaluation-harness: pip install "dynaexq[benchmarks]"', err=True)
        raise typer.Exit(1)
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(threads)
    pair, tokenizer, rows = tuple(tiers.split(",")), AutoTokenizer.from_pretrained(model), []
    with TemporaryDirectory() as scratch:
        if not task:
            write_own_task(Path(scratch), questions)
        where = str(tasks_dir) if task and tasks_dir else scratch
        manager = TaskManager(include_path=where, include_defaults=bool(task))
        for name in contestants.split(","):
            contestant = enter(name, model, device, pair, upgraded)
            found = scores(contestant, tokenizer, task or [OWN_TASK], manager, batch, limit)
            row = {f"{title}: {metric}": v for title, values in found.items() for metric, v in values.items()}
            rows.append({"contestant": name, "bytes": weights_bytes(contestant), **row})
            del contestant
    shares = recovered(rows)
    options = {"tiers": pair, "upgraded": upgraded, "limit": limit}
    results = {"machine": figures.machine(device), "model": model.name, **options, "rows": rows, "recovered": shares}
    figures.show(f"{model.name}, {' + '.join(pair)}, {upgraded:.0%} upgraded", rows)
    if shares:
        figures.show("share of the distance between low and high that is recovered", shares)
    figures.save(out, "table1_accuracy", results, lambda: plots.accuracy(rows, metrics_of(rows)), model.name)


if __name__ == "__main__":
    typer.run(main)
