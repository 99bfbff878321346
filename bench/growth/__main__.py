"""``make bench-growth``: what grows with what, and whether faster than the work.

    python -m bench.growth [--only WORD] [--page docs/growth.md --plot docs/growth.svg]

Prints a line a cost, with the exponent that its figures have beside the one they may have, and ends with
status 1 where one is larger by more than 0.3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from bench.growth import checkpoints, decoding, load, machines, memory, ranks
from bench.growth.line import Line, exponent
from bench.rivals import machine, print_table

LINES = [
    line for file in (load, memory, ranks, machines, checkpoints, decoding) for line in file.LINES
]
MOST_OVER = 0.3
COLUMNS = ["cost", "over", "sizes", "figures", "exponent", "may be", "had on"]
BEGIN, END = "<!-- figures: make bench-growth -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Growth:
    """A line and its figures."""

    line: Line
    costs: list[float]

    @property
    def exponent(self) -> float:
        return exponent(self.line.sizes, self.costs)

    @property
    def holds(self) -> bool:
        return self.exponent <= self.line.expected + MOST_OVER

    def row(self) -> list[str]:
        line = self.line
        return [
            line.name,
            line.axis,
            ", ".join(f"{size:,}" for size in line.sizes),
            ", ".join(f"{cost:.3g}" for cost in self.costs) + f" {line.unit}",
            f"{self.exponent:.2f}" + ("" if self.holds else " !"),
            f"{line.expected:g}",
            line.where,
        ]


def measured(lines: Sequence[Line]) -> list[Growth]:
    grown = []
    for line in lines:
        grown.append(Growth(line, [line.measure(size) for size in line.sizes]))
        print(" | ".join(grown[-1].row()), flush=True)
    return grown


def write_page(page: Path, grown: Sequence[Growth]) -> None:
    """Put the table between the page's two marks."""
    told = machine()
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(growth.row() for growth in grown)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    of = f"{told['cpu']}, {told['cores']} cores, {told['isa']}; {versions}."
    page.write_text(f"{before}{BEGIN}\n{of}\n\n{table}\n{END}{after}")


def draw(plot: Path, grown: Sequence[Growth]) -> None:
    """A panel a line: its figures, and dashed what they may be."""
    columns = 4
    rows = -(-len(grown) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for panel in panels.flat[len(grown) :]:
        panel.set_visible(False)
    for panel, growth in zip(panels.flat, grown, strict=False):
        sizes, costs, line = growth.line.sizes, growth.costs, growth.line
        panel.loglog(sizes, costs, "o-")
        allowed = [costs[0] * (size / sizes[0]) ** line.expected for size in sizes]
        panel.loglog(sizes, allowed, "--", color="gray")
        panel.set(title=line.name, xlabel=line.axis, ylabel=line.unit)
        panel.grid(True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(plot)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--only", default="", help="lines whose name has this word")
    parser.add_argument("--page", type=Path, help="a document whose table is written anew")
    parser.add_argument("--plot", type=Path, help="an SVG to draw")
    asked = parser.parse_args()
    lines = [line for line in LINES if asked.only in line.name]
    if not lines:
        names = ", ".join(line.name for line in LINES)
        parser.error(f"--only: expected a word of one of {names}; got {asked.only!r}")
    grown = measured(lines)
    print_table("growth", COLUMNS, [growth.row() for growth in grown])
    if asked.page is not None:
        write_page(asked.page, grown)
    if asked.plot is not None:
        draw(asked.plot, grown)
    failed = [growth.line.name for growth in grown if not growth.holds]
    if failed:
        print(f"faster than the work, by more than {MOST_OVER}: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
