"""What a layer communicates, as its tests compare it."""

from __future__ import annotations

from collections import Counter

from pyparallel.comm.group import Group


def counted(counter: Counter) -> dict:
    """What was counted, zeros left out."""
    return {name: value for name, value in counter.items() if value}


def expected_counts(group: Group, **calls: tuple[int, int]) -> dict:
    """``name=(calls, bytes)``; nothing at all on one rank."""
    expected = {}
    if group.size > 1:
        for name, (number, num_bytes) in calls.items():
            expected[name] = number
            expected[name, "bytes"] = num_bytes
    return {name: value for name, value in expected.items() if value}
