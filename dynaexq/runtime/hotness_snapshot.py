"""Hotness snapshots: what was hot, kept in a file, so that the next run starts where this one ended.

A snapshot is a safetensors file with one tensor, `hotness` float64 `[L, E]`, and in its metadata the names of the
layers and the class of the model it belongs to.
"""

import json
from pathlib import Path

import numpy as np
import torch

from dynaexq.checkpoint import read_tensors, write_tensors
from dynaexq.errors import CheckpointError, HotnessError
from dynaexq.safeguards.outside_files import parse_json

VERSION = "1"
_KIND = "dynaexq hotness snapshot"
_KINDS = (_KIND, "dynaexq heat profile")  # ✗ in files of before it had its name


def write_snapshot(path: str | Path, model: str, layers: dict[str, np.ndarray]) -> None:
    """Write one row of hotness `[E]` for each of `layers`; `model` is the name of its class. Raises OSError."""
    metadata = {"kind": _KIND, "version": VERSION, "model": model, "layers": json.dumps(list(layers))}
    write_tensors(Path(path), {"hotness": torch.from_numpy(np.stack(list(layers.values())))}, metadata)


def read_snapshot(path: str | Path, model: str, layers: list[str], num_experts: int) -> np.ndarray:
    """The hotness `[L, E]` of `layers`, in their order.

    Raises:
        HotnessError: not a snapshot, damaged, or of another model.
        FileNotFoundError: there is no such file.
    """
    owner, names, hotness = _content(Path(path))
    rows = {name: index for index, name in enumerate(names)}
    missing = [name for name in layers if name not in rows]
    if owner != model or missing or hotness.shape != (len(rows), num_experts):
        raise HotnessError(
            f"{path} belongs to a {owner} with {len(rows)} layers of {hotness.shape[-1]} experts, "
            f"expected a {model} with {num_experts} experts in each of {len(layers)} layers"
            + (f", {missing[0]} among them" if missing else "")
            + "; save one of this model with runtime.save_hotness"
        )
    found = hotness[[rows[name] for name in layers]]
    if not is_hotness(found):
        raise HotnessError(f"{path} holds values that are no hotness (finite and not negative); save it again")
    return found


def is_hotness(values: np.ndarray) -> bool:
    """Whether all of `values` could be a share of routing."""
    return bool((np.isfinite(values) & (values >= 0)).all())


def _content(path: Path) -> tuple[str, list[str], np.ndarray]:
    """The model's class, the layers' names, and hotness `[L, E]`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no hotness snapshot {path}; runtime.save_hotness(path) writes one")
    try:
        tensors, metadata = read_tensors(path, _KINDS, ["hotness"])
        if metadata.get("version") != VERSION:
            raise HotnessError(
                f"{path} is no hotness snapshot of version {VERSION}; runtime.save_hotness(path) writes one"
            )
        names, hotness = parse_json(metadata["layers"]), tensors["hotness"].double().numpy()
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or hotness.ndim != 2:
            raise ValueError("expected names of layers, and a table")
        return metadata["model"], names, hotness
    except (CheckpointError, KeyError, ValueError) as error:
        if isinstance(error, HotnessError):
            raise
        raise HotnessError(f"{path} cannot be read as a hotness snapshot: {error}; save it again") from error
