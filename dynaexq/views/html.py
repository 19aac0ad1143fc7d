"""A snapshot as a piece of HTML without scripts, for a notebook and for the server's page; light and dark alike."""

from collections.abc import Sequence
from html import escape
from typing import Any

from dynaexq.views.words import figures, moves_in_words, relative_hotness, upgraded

LEVELS = 5
MOST_MOVES = 12
STYLE = """<style>
.dynaexq{font:14px/1.4 system-ui,sans-serif;color:inherit;max-width:72rem}
.dynaexq .figures{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}
.dynaexq table{border-collapse:collapse;color:inherit;background:none}
.dynaexq td{padding:.1rem .8rem .1rem 0;text-align:left;border:0;background:none}
.dynaexq td+td{font-variant-numeric:tabular-nums}
.dynaexq h4{margin:.8rem 0 .3rem;font-size:1em}
.dynaexq svg{display:block;width:100%;border:1px solid #8886;color:inherit}
.dynaexq .bad{color:#c33;font-weight:bold}
</style>"""


def fragment(snapshot: dict[str, Any]) -> str:
    """A `<div>` with the figures, two maps of layers by experts, the coverage over time and the latest moves."""
    health = snapshot["health"]
    state = "" if health["state"] == "ok" else ' class="bad"'
    parts = [
        f"<h3>dynaexq: {escape(snapshot['model'])}, {escape(' + '.join(snapshot['tiers']))}</h3>",
        f"<p{state}>health: {escape(health['words'])}</p>",
        f"<p>{escape(snapshot['verdict']['words'])}</p>",
        '<div class="figures">' + "".join(_table(title, rows) for title, rows in figures(snapshot)) + "</div>",
        _map("precision: upgraded experts, a row for each layer", upgraded(snapshot), "#4477aa"),
        _map("hotness: beside each layer's hottest expert", relative_hotness(snapshot), "#ee6677"),
        _line([moment["coverage"] for moment in snapshot["coverage"]]),
        _table("latest moves", moves_in_words(snapshot, MOST_MOVES)),
    ]
    return f'{STYLE}<div class="dynaexq">{"".join(parts)}</div>'


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div><h4>{escape(title)}</h4><table>{cells}</table></div>"


def _map(title: str, rows: list[list[float]], color: str) -> str:
    """One cell for each value in [0, 1], the fuller the darker: a path for each of few levels keeps it small."""
    paths: list[list[str]] = [[] for _ in range(LEVELS + 1)]
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            paths[-int(-value * LEVELS // 1)].append(f"M{x} {y}.5h1")
    strokes = "".join(
        f'<path d="{"".join(path)}" stroke="{color}" stroke-opacity="{level / LEVELS:.2f}"/>'
        for level, path in enumerate(paths)
        if level and path
    )
    height = max(60, min(400, 8 * len(rows)))
    box = f'viewBox="0 0 {len(rows[0])} {len(rows)}" preserveAspectRatio="none" height="{height}"'
    label = f'role="img" aria-label="{escape(title)}"'
    return f'<h4>{escape(title)}</h4><svg {box} {label} shape-rendering="crispEdges">{strokes}</svg>'


def _line(values: list[float]) -> str:
    """Coverage from 0 at the bottom to 1 at the top."""
    if len(values) < 2:
        return ""
    step = 1000 / (len(values) - 1)
    points = " ".join(f"{index * step:.1f},{100 - 100 * value:.1f}" for index, value in enumerate(values))
    title = f"coverage over the last {len(values)} decisions, now {values[-1]:.0%}"
    stroke = 'fill="none" stroke="#228833" stroke-width="2" vector-effect="non-scaling-stroke"'
    line = f'<polyline points="{points}" {stroke}/>'
    box = 'viewBox="0 0 1000 100" preserveAspectRatio="none" height="90"'
    return f'<h4>{title}</h4><svg {box} role="img" aria-label="{title}">{line}</svg>'
