"""Plain SVG: shapes as text, blocks stacked to a page, colours for light and for dark ones."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, MARGIN = 980, 20

# The first ranks' colours; of middling lightness, so that dark letters on them and light or dark paper
# around them can both be read.
_COLOURS = ("#7db0e8", "#f2a65a", "#86cf8a", "#e78fb0", "#b59be0", "#e0cf63", "#74d0cd", "#cda57e")
# Of lines and letters outside any shape; `on` are letters on a rank's colour.
_STYLE = """<style>
text { font: 12px sans-serif; fill: #1c1e21 }
.page { fill: #ffffff }
.title { font-size: 16px; font-weight: bold }
.head { font-weight: bold }
.note { font-size: 11px; fill: #5a6068 }
.on { font-size: 11px; fill: #15171a }
.tight { font-size: 9.5px; fill: #15171a }
.frame { fill: none; stroke: #6b7280 }
.box { fill: #d5dae1; stroke: #6b7280 }
.empty { fill: #eceff3 }
.arrow { stroke: #6b7280; fill: none }
@media (prefers-color-scheme: dark) {
text { fill: #e8eaed }
.page { fill: #16181c }
.note { fill: #a6adb8 }
.frame { stroke: #9aa2ae }
.box { fill: #aab2be; stroke: #9aa2ae }
.empty { fill: #2a2e35 }
.arrow { stroke: #9aa2ae }
}
</style>"""


@dataclass(frozen=True)
class Block:
    """A part of a page: shapes between y = 0 and ``height``."""

    height: float
    shapes: tuple[str, ...]


def colour(rank: int) -> str:
    """A rank's colour; after the first eight, hues far from one another."""
    if rank < len(_COLOURS):
        return _COLOURS[rank]
    # The golden angle never comes back to where it was.
    hue, lightness = rank * 0.381966 % 1, 0.64 + 0.08 * (rank % 3 - 1)
    levels = (round(255 * level) for level in colorsys.hls_to_rgb(hue, lightness, 0.55))
    return "#" + "".join(f"{level:02x}" for level in levels)


def paler(fill: str, part: float) -> str:
    """A colour #rrggbb, ``part`` of the way to white."""
    levels = (int(fill[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(level + (255 - level) * part):02x}" for level in levels)


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    fill: str | None = None,
    style: str | None = None,
    tip: str = "",
    data: str = "",
) -> str:
    """A rectangle, filled or of a class ``style``; ``tip`` is shown by browsers.

    Args:
        data: what it stands for, as ``data-of``, for whoever reads the picture as text.
    """
    look = f'fill="{fill}"' if fill is not None else f'class="{style}"'
    of = f' data-of="{escape(data)}"' if data else ""
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" {look}{of}>'
        f"{inside}</rect>"
    )


def text(x: float, y: float, words: str, *, style: str = "", anchor: str = "start") -> str:
    """Words from, around, or up to x, on the line y."""
    look = f' class="{style}"' if style else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{look}{place}>{escape(words)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its end."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="arrow" '
        f'marker-end="url(#tip)"/>'
    )


def page(blocks: Sequence[Block]) -> str:
    """One picture of blocks, one below the other."""
    shapes, y = [], float(MARGIN)
    for block in blocks:
        shapes += [f'<g transform="translate(0,{y:.1f})">', *block.shapes, "</g>"]
        y += block.height + 16
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0 L8,4 L0,8" class="arrow"/></marker></defs>'
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" '
            f'width="{WIDTH}" height="{y:.0f}">',
            _STYLE,
            tip,
            f'<rect width="{WIDTH}" height="{y:.0f}" class="page"/>',
            *shapes,
            "</svg>\n",
        )
    )


def clipped(words: str, width: float, size: float = 6.0) -> str:
    """``words`` where they have room, else nothing; ``size`` is a letter's width."""
    return words if len(words) * size <= width else ""


def human_bytes(count: float) -> str:
    """Bytes with a unit and three digits.

    >>> human_bytes(134217728)
    '134 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def listed(ranks: Sequence[int]) -> str:
    """Numbers in words, runs shortened.

    >>> listed((0, 1, 2, 5))
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
