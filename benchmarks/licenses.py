"""The licenses of what dynaexq depends on, as the installed packages state them.

python benchmarks/licenses.py [--extra dev] [--json FILE]
"""

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def dependencies(extra: str) -> dict[str, str]:
    """Name and version of every package that dynaexq needs, directly or not, and what `extra` adds."""
    found: dict[str, str] = {}
    todo = [("dynaexq", extra)]
    while todo:
        name, of_extra = todo.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        for requirement in package.requires or ():
            needed = re.match(r"[\w.-]+", requirement)
            if needed is None or ("extra ==" in requirement and f'"{of_extra}"' not in requirement.replace("'", '"')):
                continue
            key = re.sub(r"[-_.]+", "-", needed[0]).lower()
            if key != "dynaexq" and key not in found and _is_installed(key):
                found[key] = distribution(key).version
                todo.append((key, ""))
    return dict(sorted(found.items()))


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def license(name: str) -> str:
    """What a package says of its license, in a line."""
    about = distribution(name).metadata
    classifiers = [text.split(" :: ")[-1] for text in about.get_all("Classifier") or () if text.startswith("License")]
    stated = about.get("License-Expression") or ", ".join(classifiers) or (about.get("License") or "").split("\n")[0]
    return stated[:60] or "not stated"


def main(
    extra: str = "",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    rows = [
        {"package": name, "version": version, "license": license(name)}
        for name, version in dependencies(extra).items()
    ]
    table = Table("package", "version", "license")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
