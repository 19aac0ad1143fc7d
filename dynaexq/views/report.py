"""A snapshot for people, wherever they look: text in a terminal or a file, HTML in a notebook."""

import shutil
from typing import Any

from rich.console import Console, RenderableType

from dynaexq.views.html import fragment
from dynaexq.views.terminal import SnapshotView

NARROWEST, WIDEST = 40, 120
"""Characters of a report as text, whatever the terminal's width."""


class Report:
    """A snapshot for people: prints as text, and shows itself in a notebook.

    Args:
        snapshot: as `Runtime.snapshot` makes it.
    """

    def __init__(self, snapshot: dict[str, Any]):
        self.snapshot = snapshot

    def __rich__(self) -> RenderableType:
        return SnapshotView(self.snapshot)

    def __str__(self) -> str:
        width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
        console = Console(width=width, force_terminal=False, force_jupyter=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return fragment(self.snapshot)
