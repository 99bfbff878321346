"""``pyparallel kernels``: what the compiler makes of every Triton kernel, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "--arch",
        nargs="+",
        default=list(ARCHITECTURES),
        metavar="ARCH",
        help=f"architectures to compile for (default: {' '.join(ARCHITECTURES)})",
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only kernels whose name contains one of these",
    )
    parser.add_argument("--jobs", type=int, help="processes that compile (default: the cores)")
    parser.add_argument(
        "--no-cache", action="store_true", help="compile again even where nothing changed"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compile, print, and return 1 if a kernel misses a line without saying why."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    from pyparallel.commands.flags import check_numbers
    from pyparallel.kernels.report import report

    check_numbers(args)
    errors = Console(stderr=True)
    bar = Progress(
        TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), console=errors, transient=True
    )
    with bar:
        task = bar.add_task("compiling", total=None)
        rows = report.compile_all(
            args.arch,
            names=args.kernel,
            jobs=args.jobs,
            cache=None if args.no_cache else report.cache_directory(),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    wrong = [row for row in rows if row["wrong"]]
    if args.markdown:
        args.markdown.write_text(report.markdown(rows))
    if args.json:
        json.dump({"kernels": rows}, sys.stdout)
        print()
        return 1 if wrong else 0
    console = Console()
    for arch in dict.fromkeys(row["arch"] for row in rows):
        table = Table(title=arch)
        for title, _ in report.COLUMNS:
            table.add_column(title, overflow="fold")
        for row in (r for r in rows if r["arch"] == arch):
            style = "red" if row["wrong"] else "dim" if row["excused"] else ""
            cells = (str(row.get(key, "")) for _, key in report.COLUMNS)
            table.add_row(*cells, style=style)
        console.print(table)
        reasons = dict.fromkeys(
            text for row in rows if row["arch"] == arch for text in row["excused"]
        )
        for text in reasons:
            console.print(f"  {text}", highlight=False)
    for row in wrong:
        faults = "; ".join(row["wrong"])
        errors.print(f"{row['arch']} {row['name']} [{row['config']}]: {faults}", markup=False)
    return 1 if wrong else 0
