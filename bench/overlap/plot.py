"""Timelines and curves as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pyparallel.overlap.schedule import COMMUNICATION, COMPUTE
from pyparallel.overlap.timing import Timeline

COLORS = {
    "matmul": "#3b6ea8",
    "partial": "#3b6ea8",
    "matmul_all": "#3b6ea8",
    "weight_gradient": "#6a4c93",
    "gather": "#d98c3f",
    "pull": "#d98c3f",
    "pull_partial": "#d98c3f",
    "publish": "#c9b458",
    "meet": "#b04a5a",
    "scatter": "#d98c3f",
    "gather_all": "#d98c3f",
    "reduce_scatter_all": "#d98c3f",
    "reduce": "#5a9367",
    "copy_own": "#999999",
}
WIDTH, LEFT, ROW, GAP = 900, 130, 22, 6


def timeline_svg(timelines: Sequence[tuple[str, Timeline]], *, rank: int = 0) -> str:
    """One block a timeline, a row a stream, all on one scale; rank `rank` is drawn."""
    longest = max(timeline.total for _, timeline in timelines)
    scale = (WIDTH - LEFT - 20) / longest
    parts: list[str] = []
    y = 10
    for title, timeline in timelines:
        parts.append(_text(10, y + 14, f"{title}: {timeline.total * 1e6:.0f} us", bold=True))
        y += 22
        for stream in (*COMPUTE, COMMUNICATION):
            parts.append(_text(10, y + 15, stream))
            for span in timeline.spans:
                if span.rank != rank or span.stream != stream:
                    continue
                x, width = LEFT + span.start * scale, max((span.end - span.start) * scale, 0.5)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" '
                    f'fill="{COLORS[span.action]}" stroke="#fff" stroke-width="0.5">'
                    f"<title>{escape(span.name)}: {span.start * 1e6:.1f} to "
                    f"{span.end * 1e6:.1f} us</title></rect>"
                )
            y += ROW + GAP
        y += 12
    legend = {"matmul": "matmul", "gather": "communication", "reduce": "rank-ordered sum"}
    for position, (action, label) in enumerate(legend.items()):
        x = LEFT + position * 190
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLORS[action]}"/>')
        parts.append(_text(x + 20, y + 12, label))
    return _svg(WIDTH, y + 26, parts)


def curves_svg(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], *, title: str, x_label: str
) -> str:
    """Lines of (x, share): x on a doubling scale, the share from 0 to 1; a name and a color each."""
    width, height, left, top, right = 720, 320, 60, 36, 260
    xs = sorted({x for _, _, points in series for x, _ in points})
    place = {x: left + i * (width - left - right) / max(len(xs) - 1, 1) for i, x in enumerate(xs)}

    def level(share: float) -> float:
        return top + (height - top - 50) * (1 - min(max(share, 0.0), 1.0))

    parts = [_text(left, 20, title, bold=True)]
    for tick in range(0, 101, 20):
        y = level(tick / 100)
        parts.append(
            f'<line x1="{left}" x2="{width - right + 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(left - 42, y + 4, f"{tick} %"))
    for x in xs:
        parts.append(_text(place[x] - 14, height - 32, f"{x:g}"))
    parts.append(_text(left + 120, height - 10, x_label))
    for position, (name, color, points) in enumerate(series):
        path = " ".join(f"{place[x]:.1f},{level(v):.1f}" for x, v in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.extend(
            f'<circle cx="{place[x]:.1f}" cy="{level(v):.1f}" r="3" fill="{color}"/>'
            for x, v in points
        )
        y = top + 14 + 20 * position
        parts.append(
            f'<rect x="{width - right + 28}" y="{y - 10}" width="12" height="12" fill="{color}"/>'
        )
        parts.append(_text(width - right + 46, y, name, size=10))
    return _svg(width, height, parts)


def _text(x: float, y: float, text: str, *, bold: bool = False, size: int = 12) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}"'
        f'{weight} fill="#222">{escape(text)}</text>'
    )


def _svg(width: int, height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
