"""The learning rate of a step: a warm-up, then a schedule.

    s < W:  lr = peak (s + 1) / W
    else    t = (s - W) / (T - W),   lr = peak  |  peak (1 - t)  |  peak (1 + cos(pi t)) / 2

s counts steps from 0, W of warm-up, T in all. A function of the step alone, so that a run that goes on
from a checkpoint has the rates it would have had.
"""

from __future__ import annotations

import math

LR_SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(
    peak: float, step: int, *, steps: int, warmup: int = 0, schedule: str = "constant"
) -> float:
    """The rate of step ``step`` of ``steps``.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(LR_SCHEDULES)}, got {schedule!r}")
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    part = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - part)
    return peak * (1 + math.cos(math.pi * part)) / 2
