"""What dense models say: worked out once a session, on every core, and handed to the ranks that compare.

Ranks that work out their own truths do the same work as often as there are ranks, and again for every
number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pyparallel.launch import launch

Value = TypeVar("Value")

_known: dict[tuple[Callable[..., Any], tuple[Any, ...]], Any] = {}


def truths_of(work: Callable[..., Value], cases: Sequence[tuple[Any, ...]]) -> list[Value]:
    """``work(*case)`` of every case, each worked out at its first mention.

    Args:
        work: a function of a module, which gives the same at every call.
        cases: its arguments, hashable.
    """
    missing = [case for case in dict.fromkeys(cases) if (work, case) not in _known]
    if missing:
        workers = min(len(missing), len(os.sched_getaffinity(0)))
        for found in launch(_share, workers, work, missing, workers, threads=1, timeout_s=300.0):
            _known.update({(work, missing[number]): value for number, value in found.items()})
    return [_known[work, case] for case in cases]


def _share(
    work: Callable[..., Value], cases: Sequence[tuple[Any, ...]], workers: int
) -> dict[int, Value]:
    """Every so manieth case."""
    mine = range(int(os.environ["RANK"]), len(cases), workers)
    return {number: work(*cases[number]) for number in mine}
