"""dynaexq hotness: files of hotness shown, merged and compared. They belong to layers and experts, not to a run."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dynaexq.errors import HotnessError
from dynaexq.runtime.hotness_snapshot import Snapshot, merged, open_snapshot, write_snapshot
from dynaexq.views.tables import print_table

HOTTEST = 6
UPGRADED = 0.2


def contents(path: Path) -> dict[str, Any]:
    """Whose traffic a file has, and the hottest experts of each layer with what they get of its routing.

    Raises:
        HotnessError, FileNotFoundError: as `open_snapshot`.
    """
    model, layers, snapshot = open_snapshot(path)
    order = np.argsort(-snapshot.hotness, axis=1, kind="stable")[:, :HOTTEST]
    shares = np.take_along_axis(snapshot.hotness, order, 1).sum(1) / np.maximum(snapshot.hotness.sum(1), 1e-30)
    return {
        "model": model,
        "experts": snapshot.hotness.shape[1],
        "kinds": 1 if snapshot.learned is None else len(snapshot.learned.tokens),
        "layers": {name: row.tolist() for name, row in zip(layers, order, strict=True)},
        "shares": dict(zip(layers, shares.tolist(), strict=True)),
    }


def show(found: dict[str, Any]) -> None:
    """Print what `contents` has found."""
    layers = found["layers"]
    title = f"{found['model']}: {len(layers)} layers of {found['experts']} experts, {found['kinds']} kinds of traffic"
    table = Table("layer", "hottest experts", "share of the routing", title=title)
    for name, row in layers.items():
        table.add_row(name, ", ".join(map(str, row)), f"{found['shares'][name]:.0%}")
    print_table(Console(), table)


def merge(paths: list[Path], output: Path) -> None:
    """Write one file of several. Raises HotnessError where they belong to different models."""
    model, layers, first = open_snapshot(paths[0])
    rest = [_of_the_same(path, model, layers, first) for path in paths[1:]]
    write_snapshot(output, model, layers, merged([first, *rest]))


def comparison(one: Path, other: Path) -> dict[str, Any]:
    """How alike two files are. Raises HotnessError where they belong to different models."""
    model, layers, first = open_snapshot(one)
    second = _of_the_same(other, model, layers, first)
    return {
        "model": model,
        "files": [str(one), str(other)],
        "correlation": float(np.corrcoef(first.hotness.ravel(), second.hotness.ravel())[0, 1]),
        "covered by its own": [_covered(first, first), _covered(second, second)],
        "covered by the other": [_covered(first, second), _covered(second, first)],
    }


def show_comparison(found: dict[str, Any]) -> None:
    """Print what `comparison` has found."""
    table = Table("traffic of", "its own best fifth covers", "the other's", title=found["model"])
    for name, own, others in zip(
        found["files"], found["covered by its own"], found["covered by the other"], strict=True
    ):
        table.add_row(name, f"{own:.0%}", f"{others:.0%}")
    print_table(Console(), table)
    Console().print(f"correlation {found['correlation']:.2f}")


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
