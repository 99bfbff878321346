"""What is said of a file: a line of errors for each quantity, of labels, of choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.planner.choices import Choice
from bench.planner.truth import Pair


@dataclass(frozen=True)
class Line:
    """One quantity of one file: errors as fractions, and the floor's."""

    file: str
    quantity: str
    count: int
    median: float
    p90: float
    worst: float
    floor_median: float
    floor_p90: float
    floor_worst: float
    calibrated: bool


@dataclass(frozen=True)
class Labels:
    """Fits or fails, of one file: how often the planner was right."""

    file: str
    quantity: str
    count: int
    right: float
    false_alarms: float
    failures_called: float
    floor_right: float


def quantile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def line_of(file: str, pairs: Sequence[Pair]) -> Line:
    """The errors of pairs of one quantity."""
    errors, floors = [pair.error for pair in pairs], [pair.floor_error for pair in pairs]
    return Line(
        file,
        pairs[0].quantity,
        len(pairs),
        *(quantile(errors, share) for share in (0.5, 0.9, 1.0)),
        *(quantile(floors, share) for share in (0.5, 0.9, 1.0)),
        pairs[0].calibrated,
    )


def labels_of(file: str, pairs: Sequence[Pair]) -> Labels:
    """How well 1 (fits) and 0 (fails) were told apart."""
    fit = [pair for pair in pairs if pair.measured]
    failed = [pair for pair in pairs if not pair.measured]
    return Labels(
        file,
        pairs[0].quantity,
        len(pairs),
        right=sum(pair.predicted == pair.measured for pair in pairs) / len(pairs),
        false_alarms=sum(not pair.predicted for pair in fit) / max(1, len(fit)),
        failures_called=sum(not pair.predicted for pair in failed) / max(1, len(failed)),
        floor_right=sum(pair.floor == pair.measured for pair in pairs) / len(pairs),
    )


def print_tables(
    lines: Sequence[Line], labels: Sequence[Labels], choices: Sequence[Choice]
) -> None:
    """For people: percents, aligned; a table of nothing is left out."""
    _print_table(
        "Errors in percent; floor: the naive formula's.",
        ("file", "quantity", "n", "median", "p90", "worst", "floor", "p90", "worst", ""),
        [
            (
                line.file,
                line.quantity,
                str(line.count),
                *_percents(line.median, line.p90, line.worst),
                *_percents(line.floor_median, line.floor_p90, line.floor_worst),
                "calibrated" if line.calibrated else "",
            )
            for line in lines
        ],
    )
    _print_table(
        "Fits or fails, in percent.",
        ("file", "quantity", "n", "right", "false alarms", "failures called", "floor right"),
        [
            (
                each.file,
                each.quantity,
                str(each.count),
                *_percents(each.right, each.false_alarms, each.failures_called, each.floor_right),
            )
            for each in labels
        ],
    )
    _print_table(
        "Picking the best of rivals, in percent; hit: within 3 %; of 3: three picks' best, median.",
        (
            "file",
            "quantity",
            "groups",
            "hit",
            "regret",
            "worst",
            "of 3",
            "floor hit",
            "floor regret",
        ),
        [
            (
                each.file,
                each.quantity,
                str(each.groups),
                *_percents(each.hit, each.regret, each.worst_regret, each.of_three),
                *_percents(each.floor_hit, each.floor_regret),
            )
            for each in choices
        ],
    )


def _percents(*shares: float) -> tuple[str, ...]:
    return tuple(f"{100 * share:.1f}" for share in shares)


def _print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    rows = [head, *([row[0].removesuffix(".json"), *row[1:]] for row in rows)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    print(f"{title}\n")
    for row in rows:
        cells = (
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print()
