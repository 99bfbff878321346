"""One injected fault and its verdict."""

from __future__ import annotations

from dataclasses import dataclass

# What may not happen. "ok" is everything else: named in a line, or the right answer.
VERDICTS = ("ok", "lost", "hung", "joined", "left", "wrong")
# Seconds in which a death ends everything, and that a stop may take beyond its timeout.
DEATH_S = 1.0
STOP_S = 1.0


@dataclass(frozen=True)
class Row:
    """A fault.

    Attributes:
        campaign, phase, fault: what was done to what.
        verdict: of VERDICTS.
        ends: "death" or "stop" where the time it took to end it counts, else "".
        seconds: that time, from the fault (a stop: beyond its timeout) to the launcher's error.
        detail: what was seen, and how to see it again.
    """

    campaign: str
    phase: str
    fault: str
    verdict: str = "ok"
    ends: str = ""
    seconds: float = 0.0
    detail: str = ""
