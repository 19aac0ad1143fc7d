"""Every family through every door, as docs/compatibility.md says."""

import re
from pathlib import Path

import pytest
import transformers
from doors import DOORS, KNOWN_REASONS, YES, row, walk
from models import TINY_FAMILIES, is_known

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def rows() -> dict[str, list[str]]:
    """The cells of the page by family."""
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.M)
    return {name: cells.split(" | ") for name, cells in found if name in TINY_FAMILIES}


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_family_passes_the_doors_that_the_page_says(name: str) -> None:
    if not is_known(name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name} with the experts interface")
    assert row(name, walk(name)) == row(name, rows().get(name, ["python tests/helpers/doors.py prints this row"]))


def test_the_page_names_every_door_and_every_reason() -> None:
    page = PAGE.read_text()
    assert not [door.__name__ for door in DOORS if f"`{door.__name__}`" not in page]
    said = {cell for cells in rows().values() for cell in cells} - {YES}
    assert said <= set(KNOWN_REASONS)
    assert not [reason for reason in said if f"| {reason} | {KNOWN_REASONS[reason]} |" not in page]
