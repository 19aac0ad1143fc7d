"""What all pictures share: figures that a notebook shows, and colors that remain apart for color-blind readers."""

from collections.abc import Iterable, Iterator
from functools import cache
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Paul Tol's "bright"."""

MARKERS = ("o", "s", "D", "^", "v", "<", "*")


def looks(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Each of `names` once, with a color and a marker of its own."""
    return zip(dict.fromkeys(names), cycle(COLORS), cycle(MARKERS), strict=False)


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure of so many inches; an ImportError with the remedy where matplotlib is missing."""
    return _figure_class()(figsize=size, layout="constrained")


@cache
def _figure_class() -> "type[Figure]":
    """Matplotlib's figure, which a notebook shows also where pyplot was never imported."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "dynaexq[plots]"') from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            written = BytesIO()
            self.savefig(written, format="png")
            return written.getvalue()

    return Picture
