"""How ``pyparallel kernels`` prints its tables: for a terminal, and plainly where that is read on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

Columns = Sequence[tuple[str, str]]


def print_tables(rows: Sequence[dict[str, Any]], columns: Columns) -> None:
    """A table an architecture, and below it why rows do not meet a line."""
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        notes = dict.fromkeys(text for row in own for text in row["excused"])
        if sys.stdout.isatty():
            _on_terminal(arch, own, columns, list(notes))
        else:
            _plainly(arch, own, columns, list(notes))


def cells_of(row: dict[str, Any], columns: Columns) -> list[str]:
    """A row's texts; - for a figure that this architecture does not have."""
    found = (row.get(key) for _, key in columns)
    return ["-" if value is None else str(value) for value in found]


def _plainly(
    arch: str, rows: Sequence[dict[str, Any]], columns: Columns, notes: Sequence[str]
) -> None:
    """Columns as wide as their widest cell, two spaces between: one line a row, for grep and awk."""
    lines = [[title for title, _ in columns], *(cells_of(row, columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(arch)
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    for note in notes:
        print(f"  {note}")
    print()


def _on_terminal(
    arch: str, rows: Sequence[dict[str, Any]], columns: Columns, notes: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(title=arch)
    for title, _ in columns:
        table.add_column(title, overflow="fold")
    for row in rows:
        style = "red" if row["wrong"] else "dim" if row["excused"] else ""
        table.add_row(*cells_of(row, columns), style=style)
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False, markup=False)
