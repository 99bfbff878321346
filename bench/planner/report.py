"""The planner against published measurements: one table, a line for each quantity of each file.

``python -m bench.planner.report FOLDER [--plots FOLDER] [--json FILE]``, or ``make bench-planner``. A
file whose name no reader knows is skipped, and said to be. Errors are |predicted / measured - 1|; the
floor is the naive formula that the reader names.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.planner.choices import Choice, choice_of
from bench.planner.tables import Labels, Line, labels_of, line_of, print_tables
from bench.planner.truth import Pair, read, readers


def report(folder: Path) -> tuple[list[Line], list[Labels], list[Choice], dict[str, list[Pair]]]:
    """Everything of a folder; files that are skipped are told of on standard error.

    Raises:
        ValueError: no such folder, or nothing in it that a reader knows.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: expected a folder of measurements; give another as DATA=FOLDER"
        )
    known = readers()
    lines: list[Line] = []
    labels: list[Labels] = []
    choices: list[Choice] = []
    all_pairs: dict[str, list[Pair]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name not in known:
            print(f"{path.name}: skipped, no reader knows it", file=sys.stderr)
            continue
        try:
            reading = read(path, known[path.name])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{path.name}: skipped, {type(error).__name__}: {error}", file=sys.stderr)
            continue
        quantities: dict[tuple[str, bool], list[Pair]] = defaultdict(list)
        for pair in reading.pairs:
            if pair.unit == "label" or pair.measured > 0:
                quantities[pair.quantity, pair.calibrated].append(pair)
            else:
                reading.unused[f"{pair.quantity}: a measurement of nothing"] += 1
        for reason, count in reading.unused.items():
            print(f"{path.name}: {count} rows not used: {reason}", file=sys.stderr)
        for _, pairs in sorted(quantities.items()):
            if pairs[0].unit == "label":
                labels.append(labels_of(path.name, pairs))
                continue
            lines.append(line_of(path.name, pairs))
            found = choice_of(path.name, pairs)
            choices.extend([found] if found else [])
        all_pairs[path.name] = reading.pairs
    if not all_pairs:
        raise ValueError(f"{folder}: expected at least one file of {', '.join(sorted(known))}")
    return lines, labels, choices, all_pairs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--plots", type=Path, help="a folder for predicted against measured, a PNG a file"
    )
    parser.add_argument("--json", type=Path, help="a file for the table's numbers")
    args = parser.parse_args(argv)
    try:
        lines, labels, choices, pairs = report(args.folder)
    except ValueError as error:
        print(f"bench-planner: {error}", file=sys.stderr)
        return 2
    print_tables(lines, labels, choices)
    if args.json:
        written = {
            "python": platform.python_version(),
            "lines": [asdict(line) for line in lines],
            "labels": [asdict(each) for each in labels],
            "choices": [asdict(each) for each in choices],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n")
    if args.plots:
        from bench.planner.plots import plot

        plot(pairs, args.plots)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
