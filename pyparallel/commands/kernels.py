"""``pyparallel kernels``: what the compiler makes of every Triton kernel, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DUMPS = ("ttir", "ttgir", "llir", "ptx", "sass", "amdgcn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="architectures to compile for, as sm_90 or gfx942: whatever Triton takes (default: "
        f"{' '.join(ARCHITECTURES)}; with --dump sm_90, or gfx942 for amdgcn)",
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only kernels whose name contains one of these",
    )
    parser.add_argument(
        "--dump",
        nargs=2,
        metavar=("KIND", "NAME"),
        help=f"print what the compiler made of kernel NAME in all its configurations, instead of "
        f"tables; KIND: {', '.join(DUMPS)}",
    )
    parser.add_argument("--jobs", type=int, help="processes that compile (default: the cores)")
    parser.add_argument(
        "--no-cache", action="store_true", help="compile again even where nothing changed"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compile, print, and return 1 if a kernel misses a line without saying why."""
    from pyparallel.commands.flags import check_numbers

    check_numbers(args)
    if find_spec("triton") is None:
        raise ValueError(
            "kernels: expected Triton, which compiles them, but it is not installed; "
            "pip install 'pyparallel-kernels[triton]'"
        )
    return _dump(args) if args.dump else _report(args)


def _dump(args: argparse.Namespace) -> int:
    from pyparallel.kernels.report.dump import dump

    kind, name = args.dump
    if args.json or args.markdown or args.kernel:
        raise ValueError(
            "--dump: expected no --json, --markdown or --kernel with it; it prints text"
        )
    comment = ";" if kind in ("llir", "amdgcn") else "//"
    for what, text in dump(kind, name, args.arch or ["gfx942" if kind == "amdgcn" else "sm_90"]):
        print(f"{comment} {what}\n{text.strip()}\n")
    return 0


def _report(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from pyparallel.commands.kernels_output import print_tables
    from pyparallel.kernels.report import report

    errors = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn())
    silent = not sys.stderr.isatty()
    with Progress(*columns, console=errors, transient=True, disable=silent) as bar:
        task = bar.add_task("compiling", total=None)
        rows = report.compile_all(
            args.arch or ARCHITECTURES,
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
    print_tables(rows, report.COLUMNS)
    for row in wrong:
        faults = "; ".join(row["wrong"])
        print(f"{row['arch']} {row['name']} [{row['config']}]: {faults}", file=sys.stderr)
    return 1 if wrong else 0
