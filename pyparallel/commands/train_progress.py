"""What ``pyparallel train`` shows while it runs: a line a step, on standard error."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from typing import Any

# The steps whose times say how long the rest takes.
LOOKED_BACK = 20


class Progress:
    """A line for each report of rank 0.

    Args:
        steps: in all.
        tokens: of a step.
    """

    def __init__(self, steps: int, tokens: int) -> None:
        self.steps, self.tokens = steps, tokens
        self._times: deque[float] = deque(maxlen=LOOKED_BACK)
        self._before: float | None = None

    def __call__(self, kind: str, step: int, *told: Any) -> None:
        """Show a report of :func:`pyparallel.commands.train_ranks.train_rank`."""
        if kind == "step":
            loss, norm = told
            line = f"loss {loss:.4f}, gradient norm {norm:.3f}{self._speed(step)}"
        elif kind == "evaluated":
            line = f"held-out loss {told[0]:.4f}"
        else:
            line = f"wrote {told[0]}"
        print(f"step {step + 1}/{self.steps}: {line}", file=sys.stderr, flush=True)
        # What a step takes begins behind the evaluation and the saving of the one before.
        self._before = time.perf_counter()

    def _speed(self, step: int) -> str:
        """How fast it goes, and how long it still takes; the first step is not asked."""
        if self._before is None:
            return ""
        self._times.append(time.perf_counter() - self._before)
        seconds = statistics.median(self._times)
        left = duration(seconds * (self.steps - step - 1))
        return f", {self.tokens / seconds:.0f} tokens/s, {left} left"


def duration(seconds: float) -> str:
    """Of 3725 seconds: 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
