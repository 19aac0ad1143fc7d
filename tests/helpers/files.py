"""Checkpoints copied, so that tests can spoil the copy."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def copied(directory: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copied"
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def damage(path: Path, content: bytes, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(content)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file with what `change` makes of it."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))
