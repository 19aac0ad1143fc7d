"""Hotness snapshots: what was hot, kept in a file, so that the next run starts where this one ended.

A snapshot is a safetensors file with `hotness` float64 `[L, E]` and, where kinds of traffic were told apart, what was
learned of them (`policy.kinds`): `kind_profiles [K, L, E]`, `kind_tokens [K]`, `kind_words [K, buckets]`. Its metadata
has the names of the layers and the class of the model it belongs to.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dynaexq.checkpoint import read_tensors, write_tensors
from dynaexq.checkpoint.hub_files import hub_file, is_repository
from dynaexq.errors import CheckpointError, HotnessError
from dynaexq.policy.kinds import WORD_BUCKETS, LearnedKinds
from dynaexq.safeguards.outside_files import parse_json

VERSION = "1"
HUB_NAME = "hotness.safetensors"
"""The file of a repository on the Hub."""

_KIND = "dynaexq hotness snapshot"
_KINDS = (_KIND, "dynaexq heat profile")  # ✗ in files of before it had its name
_OF_KINDS = ("kind_profiles", "kind_tokens", "kind_words")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was hot in some layers.

    Attributes:
        hotness: `[L, E]`, of all traffic.
        learned: the kinds of traffic that it is the average of, where they were told apart.
    """

    hotness: np.ndarray
    learned: LearnedKinds | None = None

    def of_layers(self, rows: list[int]) -> "Snapshot":
        """The same of these layers alone, in this order."""
        learned = self.learned
        if learned is not None:
            learned = replace(learned, profiles=learned.profiles[:, rows])
        return Snapshot(self.hotness[rows], learned)


def write_snapshot(path: str | Path, model: str, layers: list[str], snapshot: Snapshot) -> None:
    """Write what was hot in `layers`; `model` is the name of its class. Raises OSError."""
    arrays, learned = {"hotness": snapshot.hotness}, snapshot.learned
    if learned is not None:
        arrays |= dict(zip(_OF_KINDS, (learned.profiles, learned.tokens, learned.words), strict=True))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    metadata = {"kind": _KIND, "version": VERSION, "model": model, "layers": json.dumps(layers)}
    write_tensors(Path(path), tensors, metadata)


def read_snapshot(
    path: str | Path, model: str, layers: list[str], num_experts: int, revision: str | None = None
) -> Snapshot:
    """What was hot in `layers`, in their order.

    Args:
        path: a file, or `organization/name` for the `hotness.safetensors` of that repository on the Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        HotnessError: not a snapshot, damaged, of another model, or not to be had from the Hub.
        FileNotFoundError: there is no such file.
    """
    owner, names, found = _content(Path(path), revision)
    rows = {name: index for index, name in enumerate(names)}
    missing = [name for name in layers if name not in rows]
    if owner != model or missing or found.hotness.shape != (len(rows), num_experts):
        raise HotnessError(
            f"{path} belongs to a {owner} with {len(rows)} layers of {found.hotness.shape[-1]} experts, "
            f"expected a {model} with {num_experts} experts in each of {len(layers)} layers"
            + (f", {missing[0]} among them" if missing else "")
            + "; save one of this model with runtime.save_hotness"
        )
    snapshot = found.of_layers([rows[name] for name in layers])
    learned = snapshot.learned
    parts = () if learned is None else (learned.profiles, learned.tokens, learned.words)
    if not all(is_hotness(values) for values in (snapshot.hotness, *parts)):
        raise HotnessError(f"{path} holds values that are no hotness (finite and not negative); save it again")
    return snapshot


def open_snapshot(path: str | Path) -> tuple[str, list[str], Snapshot]:
    """The class of the model that a file belongs to, the names of its layers, and what was hot in them.

    `path` and errors are those of `read_snapshot`.
    """
    return _content(Path(path))


def merged(snapshots: Sequence[Snapshot]) -> Snapshot:
    """One snapshot of several, of the same layers: the mean of their hotness, and the kinds of traffic of all."""
    learned = [snapshot.learned for snapshot in snapshots if snapshot.learned is not None]
    kinds = LearnedKinds.joined(learned) if learned else None
    return Snapshot(np.mean([snapshot.hotness for snapshot in snapshots], axis=0), kinds)


def is_hotness(values: np.ndarray) -> bool:
    """Whether all of `values` could be a share of routing."""
    return bool((np.isfinite(values) & (values >= 0)).all())


def _content(path: Path, revision: str | None = None) -> tuple[str, list[str], Snapshot]:
    """The model's class, the layers' names, and what was hot in them."""
    try:
        path = _located(path, revision)
        tensors, metadata = read_tensors(path, _KINDS, ["hotness"], _OF_KINDS)
        if metadata.get("version") != VERSION:
            raise HotnessError(
                f"{path} is no hotness snapshot of version {VERSION}; runtime.save_hotness(path) writes one"
            )
        arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        names, hotness = parse_json(metadata["layers"]), arrays["hotness"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or hotness.ndim != 2:
            raise ValueError("expected names of layers, and a table")
        return metadata["model"], names, Snapshot(hotness, _learned(arrays))
    except (CheckpointError, KeyError, ValueError) as error:
        if isinstance(error, HotnessError):
            raise
        raise HotnessError(f"{path} cannot be read as a hotness snapshot: {error}; save it again") from error


def _located(path: Path, revision: str | None) -> Path:
    """The file, fetched if it is that of a repository."""
    if path.exists():
        return path
    if len(path.parts) == 2 and is_repository(path) and not path.suffix:
        return hub_file(path.as_posix(), HUB_NAME, revision)
    raise FileNotFoundError(f"there is no hotness snapshot {path}; runtime.save_hotness(path) writes one")


def _learned(arrays: dict[str, np.ndarray]) -> LearnedKinds | None:
    """The kinds of traffic, if the file has any. Raises ValueError where they do not belong together."""
    if _OF_KINDS[0] not in arrays:
        return None
    profiles, tokens, words = (arrays[name] for name in _OF_KINDS)
    num_kinds = len(tokens)
    expected = (num_kinds, *arrays["hotness"].shape), (num_kinds,), (num_kinds, WORD_BUCKETS)
    if not num_kinds or (profiles.shape, tokens.shape, words.shape) != expected:
        raise ValueError("the kinds of traffic do not belong together")
    return LearnedKinds(profiles, tokens, words, recent=np.zeros(num_kinds))
