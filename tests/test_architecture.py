"""The house: which room may import which. Imports go downward only; the rooms of floor 1 are blind to each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dynaexq"

ROOMS_OF_FLOOR = {
    0: {"records", "settings", "errors", "corpus", "hardware"},
    1: {"formats", "policy", "memory", "storage", "traces"},
    2: {"kernels"},
    3: {
        "adoption",
        "experts",
        "moe",
        "control",
        "traffic",
        "watch",
        "pulse",
        "replay",
        "recording",
        "placement",
        "restoration",
        "retrieval",
        "telemetry",
        "profiles",
        "steering",
        "runtime",
        "group",
        "evaluate",
        "forecast",
    },
    4: {"hf"},
    5: {"demo", "planview", "simulate", "cli", "__init__"},
}
FLOOR_OF = {room: floor for floor, rooms in ROOMS_OF_FLOOR.items() for room in rooms}

ONLY_IN = {
    "transformers": {"hf", "demo", "cli"},
    "accelerate": {"hf"},
    "triton": {"kernels"},
    "typer": {"cli"},
    "rich": {"telemetry", "demo", "planview", "simulate"},
    "psutil": {"hf"},
    "bitsandbytes": {"hf"},
}
"""Heavy or outside packages, and the rooms that may know them."""

NUMPY_ONLY = {"policy", "traces", "watch", "control", "replay"}
STANDARD_LIBRARY_ONLY = {"records", "settings", "errors", "corpus", "hardware"}


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


def typing_only(path: Path) -> set[str]:
    """Names imported under `if TYPE_CHECKING`, which no running program sees."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            found |= {child.module for child in ast.walk(node) if isinstance(child, ast.ImportFrom)}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    room = room_of(path)
    for name in set(imports(path)) - typing_only(path):
        parts = name.split(".")
        if parts[0] != "dynaexq" or len(parts) == 1:
            continue
        other = parts[1]
        if other == room:
            continue
        assert FLOOR_OF[other] <= FLOOR_OF[room], (
            f"{room} (floor {FLOOR_OF[room]}) imports {other}, which lies above it"
        )
        if FLOOR_OF[room] == 1:
            assert FLOOR_OF[other] == 0, f"{room} imports its neighbour {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_packages_enter_through_their_own_rooms(path):
    room = room_of(path)
    outside = {name.split(".")[0] for name in imports(path)}
    for package, rooms in ONLY_IN.items():
        assert package not in outside or room in rooms, f"{room} imports {package}; only {sorted(rooms)} may"
    if room in STANDARD_LIBRARY_ONLY | NUMPY_ONLY:
        assert "torch" not in outside, f"{room} must not know torch"
    if room in STANDARD_LIBRARY_ONLY:
        assert "numpy" not in outside, f"{room} must not know numpy"


def test_triton_is_known_in_one_corner_of_the_kernels():
    knowing = {
        path.parent.relative_to(PACKAGE) for path in modules() if "triton" in {n.split(".")[0] for n in imports(path)}
    }
    assert knowing == {Path("kernels/triton")}


def test_every_room_stands_on_a_floor():
    rooms = {room_of(path) for path in modules()}
    assert rooms == set(FLOOR_OF), "a new room needs its floor in the table above"


def test_floor_three_has_no_import_cycle():
    graph = {
        room: {
            name.split(".")[1]
            for name in set(imports(PACKAGE / f"{room}.py")) - typing_only(PACKAGE / f"{room}.py")
            if name.startswith("dynaexq.")
        }
        & ROOMS_OF_FLOOR[3]
        for room in ROOMS_OF_FLOOR[3]
    }
    while graph:
        leaves = {room for room, below in graph.items() if not below & set(graph)}
        assert leaves, f"{sorted(graph)} import each other in a circle"
        graph = {room: below for room, below in graph.items() if room not in leaves}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_open_with_what_they_do_and_stay_small(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), f"{path} opens without saying what it does"
    assert len(source.splitlines()) <= 330, f"{path} has outgrown a page; cut it where it has two subjects"


def test_the_forward_never_synchronises_with_the_device():
    for path in modules():
        if room_of(path) in ("memory", "traffic", "runtime"):
            continue  # these may wait: at close, at a drain, on the staging thread
        assert "synchronize()" not in path.read_text(), f"{path} waits for the device"
