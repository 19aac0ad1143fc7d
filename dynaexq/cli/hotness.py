"""dynaexq hotness: files of hotness shown, merged and compared. They belong to layers and experts, not to a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dynaexq.errors import HotnessError
from dynaexq.runtime.hotness_snapshot import Snapshot, merged, open_snapshot, write_snapshot

HOTTEST = 6
UPGRADED = 0.2


def show(path: Path, as_json: bool) -> None:
    """Print what is in a file. Raises HotnessError or FileNotFoundError."""
    model, layers, snapshot = open_snapshot(path)
    order = np.argsort(-snapshot.hotness, axis=1, kind="stable")[:, :HOTTEST]
    figures: dict[str, Any] = {
        "model": model,
        "experts": snapshot.hotness.shape[1],
        "kinds": 1 if snapshot.learned is None else len(snapshot.learned.tokens),
        "layers": {name: row.tolist() for name, row in zip(layers, order, strict=True)},
    }
    if as_json:
        _print_json(figures)
        return
    title = f"{model}: {len(layers)} layers of {figures['experts']} experts, {figures['kinds']} kinds of traffic"
    table = Table("layer", "hottest experts", "share of the routing", title=title)
    for name, row, hot in zip(layers, order, snapshot.hotness, strict=True):
        share = hot[row].sum() / max(float(hot.sum()), 1e-30)
        table.add_row(name, ", ".join(map(str, row)), f"{share:.0%}")
    Console().print(table)


def merge(paths: list[Path], output: Path) -> None:
    """Write one file of several. Raises HotnessError where they belong to different models."""
    model, layers, first = open_snapshot(paths[0])
    rest = [_of_the_same(path, model, layers, first) for path in paths[1:]]
    write_snapshot(output, model, layers, merged([first, *rest]))
    Console().print(f"{output} holds the traffic of {len(paths)} files")


def diff(one: Path, other: Path, as_json: bool) -> None:
    """Print how alike two files are. Raises HotnessError where they belong to different models."""
    model, layers, first = open_snapshot(one)
    second = _of_the_same(other, model, layers, first)
    correlation = float(np.corrcoef(first.hotness.ravel(), second.hotness.ravel())[0, 1])
    by_own = [_covered(first, first), _covered(second, second)]
    by_other = [_covered(first, second), _covered(second, first)]
    if as_json:
        _print_json({"correlation": correlation, "covered by its own": by_own, "covered by the other": by_other})
        return
    table = Table("traffic of", "its own best fifth covers", "the other's", title=f"{model}: {one} and {other}")
    for name, own, others in zip((one, other), by_own, by_other, strict=True):
        table.add_row(str(name), f"{own:.0%}", f"{others:.0%}")
    Console().print(table)
    Console().print(f"correlation {correlation:.2f}")


def _of_the_same(path: Path, model: str, layers: list[str], first: Snapshot) -> Snapshot:
    owner, names, snapshot = open_snapshot(path)
    if (owner, names, snapshot.hotness.shape) != (model, layers, first.hotness.shape):
        raise HotnessError(
            f"expected files of one model, got {path} of a {owner} with {len(names)} layers of "
            f"{snapshot.hotness.shape[1]} experts beside a {model} with {len(layers)} of {first.hotness.shape[1]}"
        )
    return snapshot


def _covered(traffic: Snapshot, chosen_for: Snapshot) -> float:
    """Share of the routing of `traffic` that the best fifth of the experts for another covers."""
    count = max(1, round(UPGRADED * chosen_for.hotness.size))
    best = np.argsort(-chosen_for.hotness, axis=None, kind="stable")[:count]
    return float(traffic.hotness.ravel()[best].sum() / max(float(traffic.hotness.sum()), 1e-30))


def _print_json(figures: dict[str, Any]) -> None:
    Console(soft_wrap=True).print_json(json.dumps(figures))
