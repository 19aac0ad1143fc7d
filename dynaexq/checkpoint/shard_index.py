"""The index of a checkpoint, as Transformers reads it: the file of every tensor, in the directory of the index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynaexq.errors import CheckpointError
from dynaexq.safeguards.outside_files import read_json

INDEX = "model.safetensors.index.json"


def read_index(directory: Path, name: str = INDEX) -> dict[str, str]:
    """The file of every tensor, from the index called `name`.

    Raises:
        CheckpointError: there is no index, or it cannot be read, or it points out of its directory.
    """
    index = directory / name
    try:
        files = dict(read_json(index, CheckpointError, "fetch it again")["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}); fetch it again") from error
    for file in files.values():
        if not is_file_name(file):
            raise CheckpointError(f"{index} names {file!r}, which is no file of its directory; do not trust it")
    return files


def write_index(directory: Path, files: Mapping[str, str]) -> None:
    """Write the index of `files`, which are there."""
    total = sum((directory / name).stat().st_size for name in set(files.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def is_file_name(name: Any) -> bool:
    """Whether `name`, from outside, is the name of a file, and no path that leads elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name
