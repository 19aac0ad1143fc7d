"""The pages of the documentation, and the blocks in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code in a page that are marked as of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)
