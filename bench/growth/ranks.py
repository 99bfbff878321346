"""Growth of a launch over its ranks: started, met, told, ended; what they are forked from is there."""

from __future__ import annotations

import resource
import statistics
import time
import warnings

from bench.growth.line import Line
from pyparallel.launch import launch

SIZES = (8, 16, 24, 32, 48)
REPEATS = 5


def nothing() -> float:
    """What a rank does; its CPU seconds until then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def wall_s(ranks: int) -> float:
    """Seconds of one launch."""
    return _median(ranks)[0]


def cpu_s(ranks: int) -> float:
    """CPU seconds of all ranks until they do their work."""
    return _median(ranks)[1]


def _median(ranks: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        # More ranks than cores is what is measured.
        warnings.simplefilter("ignore")
        launch(nothing, 1, threads=1)
        found = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            used = sum(launch(nothing, ranks, threads=1))
            found.append((time.perf_counter() - begin, used))
    return statistics.median(wall for wall, _ in found), statistics.median(cpu for _, cpu in found)


LINES = (
    Line(
        name="launch",
        axis="ranks",
        unit="s",
        sizes=SIZES,
        expected=1,
        measure=wall_s,
    ),
    Line(
        name="launch, of all ranks",
        axis="ranks",
        unit="s of CPU",
        sizes=SIZES,
        expected=1,
        measure=cpu_s,
    ),
)
