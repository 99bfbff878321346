"""One cost over one axis, and the exponent with which it may grow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Line:
    """A cost that is measured at several sizes of what it grows with.

    ``measure(size)`` gives the cost at one size, the median of its repeats, in ``unit``; it takes
    what is fixed (start of ranks, files on disk) out of the cost where that is possible. The cost
    of size n is taken to be c n^p: ``expected`` is the p of the work itself, 1 where twice the
    size is twice the work of a rank, 0 where a rank's work stays as it is.
    """

    name: str
    axis: str
    unit: str
    sizes: tuple[int, ...]
    expected: float
    measure: Callable[[int], float]
    where: str = "this machine"
    """How it was had: measured here, simulated, or on meta tensors."""


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Slope of log cost over log size, by least squares."""
    x = [math.log(size) for size in sizes]
    y = [math.log(cost) for cost in costs]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)


def median_s(
    work: Callable[[], object],
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Seconds of a call by ``clock``, CPU's by default: the median of its repeats."""
    times = []
    for _ in range(repeats):
        begin = clock()
        work()
        times.append(clock() - begin)
    return statistics.median(times)
