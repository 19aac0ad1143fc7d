"""Tables of figures for a terminal of any width or none: no figure is ever cut off."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

UNBOUNDED = 10_000


def print_table(console: Console, table: Table) -> None:
    """Print `table` as wide as its figures need, beyond the edge of a narrow terminal if need be."""
    usual = console.width
    needed = Measurement.get(console, console.options.update(max_width=UNBOUNDED), table).maximum
    console.width = max(usual, needed)
    try:
        console.print(table)
    finally:
        console.width = usual
