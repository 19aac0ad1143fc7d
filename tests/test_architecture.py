"""The house: imports go downward only, and rooms of one floor are blind to each other.

The floors stand in one place, the table of docs/architecture.md, and so does the annotated tree of files. What is read
there is held against the code.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dynaexq"
PAGE = (ROOT / "docs" / "architecture.md").read_text()

GUARDED = {
    "transformers", "accelerate", "bitsandbytes", "safetensors", "triton",
    "typer", "rich", "psutil", "tqdm", "torch", "numpy", "huggingface_hub",
}  # fmt: skip
"""Outside packages. The table's last column says which of them each floor's rooms may import."""


def floor_table() -> dict[str, tuple[int, set[str]]]:
    """Room -> (floor, outside packages), from the rows `| 3 | `kernels` | ... | torch, triton |`."""
    rooms = {}
    for floor, names, _, outside in re.findall(r"^\| (\d) \| (`[^|]*) \| ([^|]*)\|([^|]*)\|$", PAGE, re.M):
        for room in re.findall(r"`(\w+)`", names):
            rooms[room] = int(floor), {name for name in re.split(r"[,\s]+", outside) if name in GUARDED}
    return rooms


FLOORS = floor_table()


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; say where from"
            yield node.module


def rooms_imported(path: Path) -> set[str]:
    """Other rooms of this package that a module imports."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "dynaexq" and len(parts) > 1} - {room_of(path)}


each_module = pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))


def test_every_room_stands_on_a_floor():
    assert {room_of(path) for path in modules()} - {"__init__"} == set(FLOORS), (
        "a new room needs its floor in the table of docs/architecture.md"
    )


@each_module
def test_imports_go_downward_only(path):
    room = room_of(path)
    if room == "__init__":  # the front door, above all floors
        return
    floor, _ = FLOORS[room]
    for other in rooms_imported(path):
        assert FLOORS[other][0] < floor, (
            f"{room} (floor {floor}) imports {other} (floor {FLOORS[other][0]}); imports go downward only"
        )


def test_no_two_modules_need_each_other():
    """Imports inside functions count. An `__init__` only hands names on."""
    sorter = graphlib.TopologicalSorter()
    for path in modules():
        if path.name != "__init__.py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sorter.add(name, *(n for n in imports(path) if n.startswith("dynaexq.")))
    sorter.prepare()


@each_module
def test_outside_packages_enter_through_their_own_rooms(path):
    room = room_of(path)
    allowed = GUARDED if room == "__init__" else FLOORS[room][1]
    outside = {name.split(".")[0] for name in imports(path)} & GUARDED
    assert outside <= allowed, f"{room} imports {sorted(outside - allowed)}; the table allows {sorted(allowed)}"


def test_triton_is_known_in_one_corner_of_the_kernels():
    knowing = {
        path.parent.relative_to(PACKAGE) for path in modules() if "triton" in {n.split(".")[0] for n in imports(path)}
    }
    assert knowing == {Path("kernels/triton")}


@each_module
def test_modules_open_with_what_they_do(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without saying what it does"


def test_the_tree_in_the_docs_is_the_tree_on_disk():
    tree = re.search(r"```text\ndynaexq/\n(.*?)```", PAGE, re.S)
    assert tree, "docs/architecture.md has no annotated tree"
    documented, folder = set(), ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folder.split("/")[: depth - 1], name.rstrip("/")] if depth > 1 else [name.rstrip("/")]
        if name.endswith("/"):
            folder = "/".join(folders)
        else:
            documented.add("/".join(folders))
        assert len(line.split()) > 1, f"{name} is not annotated"
    sources = {".py", ".cpp", ".h"}
    found = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*") if p.suffix in sources}
    found = {name for name in found if not name.endswith("__init__.py")} | {"__init__.py"}
    assert documented == found, f"missing: {sorted(found - documented)}; gone: {sorted(documented - found)}"


def test_the_forward_never_synchronizes_with_the_device():
    for path in modules():
        if room_of(path) in ("memory", "runtime"):
            continue  # these may wait: at close, at a drain, on the staging thread
        assert "synchronize()" not in path.read_text(), f"{path} waits for the device"
