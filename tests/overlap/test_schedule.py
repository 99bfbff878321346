"""The schedules of the overlapped pipelines: proven free of races and deadlocks, for every timing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyparallel.overlap import SCHEDULES, Schedule, all_gather_linear, check
from pyparallel.overlap.schedule import CALLER, COMMUNICATION, COMPUTE

SIZES = range(1, 9)
PIECES = (0, 1, 2, 3, 5, 8)
WITH_RING = [name for name in SCHEDULES if name != "linear_reduce_scatter"]
CASES = [(name, transport) for name in SCHEDULES for transport in ("direct", "copy")]
CASES += [(name, "ring") for name in WITH_RING]


def build(name: str, transport: str, size: int, pieces: int, **options) -> list[Schedule]:
    options["transport"] = transport
    return [SCHEDULES[name](rank=rank, size=size, pieces=pieces, **options) for rank in range(size)]


@pytest.mark.parametrize(("name", "transport"), CASES)
@pytest.mark.parametrize("size", SIZES)
def test_no_race_and_no_deadlock(name: str, transport: str, size: int) -> None:
    for pieces in PIECES:
        check(build(name, transport, size, pieces))


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_a_call_may_follow_another(name: str, transport: str) -> None:
    """On the same buffers, without a word between: what the peers still read is not overwritten."""
    for size in (2, 3, 5):
        for pieces in (0, 1, 3):
            check(build(name, transport, size, pieces), calls=2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_meeting_is_needed(name: str) -> None:
    """Dropping one on all ranks is found, within a call or at the next one."""
    schedules = build(name, "copy", 3, 2)
    meetings = [step.name for step in schedules[0].steps if step.is_meeting]
    assert len(meetings) >= 2
    for dropped in meetings:
        broken = [
            replace(
                s,
                steps=tuple(replace(x, action="fork") if x.name == dropped else x for x in s.steps),
            )
            for s in schedules
        ]
        with pytest.raises(ValueError, match=r"at the same time|nothing has written|of call 0"):
            check(broken, calls=2)


def test_ranks_that_meet_unequally_are_found() -> None:
    schedules = build("all_gather_linear", "copy", 3, 1)
    fewer = tuple(
        replace(s, action="fork") if s.name == "gather_taken" else s for s in schedules[1].steps
    )
    with pytest.raises(ValueError, match="rank 0 meets for"):
        check([schedules[0], replace(schedules[1], steps=fewer), schedules[2]])


@pytest.mark.parametrize("transport", ["direct", "ring", "copy"])
@pytest.mark.parametrize("size", range(2, 9))
def test_reused_slots(transport: str, size: int) -> None:
    for pieces in (1, 2, 3, 4):
        least = pieces + 1 if transport == "ring" else 1
        for slots in range(least, least + 4):
            check(build("all_gather_linear", transport, size, pieces, slots=slots))


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_every_wait_is_needed(name: str, transport: str) -> None:
    """Dropping any one wait of any step is found, so the check can fail and no wait is idle."""
    schedules = build(name, transport, 3, 2)
    dropped = 0
    for position, step in enumerate(schedules[1].steps):
        for wait in step.waits:
            waits = tuple(name for name in step.waits if name != wait)
            steps = list(schedules[1].steps)
            steps[position] = replace(step, waits=waits)
            if wait in _implied(schedules[1], position, waits):
                continue
            if step.action == "join" and wait.endswith("_taken"):
                # No region asks for it: it is there so that a captured graph leaves no stream behind.
                continue
            with pytest.raises(ValueError, match=r"at the same time|nothing has written"):
                check([schedules[0], replace(schedules[1], steps=tuple(steps)), schedules[2]])
            dropped += 1
    assert dropped >= 8


def _implied(schedule: Schedule, position: int, waits: tuple[str, ...]) -> set[str]:
    """Steps that a step follows through its other waits and its stream."""
    by_name = {step.name: i for i, step in enumerate(schedule.steps)}
    found: set[str] = set()
    pending = [by_name[name] for name in waits]
    stream = schedule.steps[position].stream
    pending += [i for i in range(position) if schedule.steps[i].stream == stream]
    while pending:
        i = pending.pop()
        step = schedule.steps[i]
        if step.name in found:
            continue
        found.add(step.name)
        pending += [by_name[name] for name in step.waits]
        pending += [j for j in range(i) if schedule.steps[j].stream == step.stream]
    return found


@pytest.mark.parametrize("transport", ["direct", "ring", "copy"])
def test_reused_slot_waits_are_needed(transport: str) -> None:
    schedules = build("all_gather_linear", transport, 4, 2, slots=3)
    for position, step in enumerate(schedules[2].steps):
        if step.action not in ("gather", "pull") or step.waits in ((), ("fork",)):
            continue
        steps = list(schedules[2].steps)
        steps[position] = replace(step, waits=())
        broken = replace(schedules[2], steps=tuple(steps))
        with pytest.raises(ValueError, match="at the same time"):
            check([*schedules[:2], broken, schedules[3]])


def test_too_few_ring_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="slots: expected at least 4"):
        all_gather_linear(rank=0, size=4, pieces=3, transport="ring", slots=3)


def test_wrong_chunk_is_found() -> None:
    """A rank that forwards another chunk than its neighbour expects."""
    schedules = build("all_gather_linear", "ring", 3, 1)
    steps = [
        replace(s, send_chunk=(0, 0)) if s.name == "gather[2,0]" else s for s in schedules[0].steps
    ]
    with pytest.raises(ValueError, match="rank 0 sends"):
        check([replace(schedules[0], steps=tuple(steps)), *schedules[1:]])


def test_deadlock_is_found() -> None:
    """Two ranks that exchange in opposite orders."""
    schedules = build("linear_reduce_scatter", "direct", 3, 1)
    steps = list(schedules[0].steps)
    first, second = (i for i, s in enumerate(steps) if s.action == "scatter")
    steps[first], steps[second] = steps[second], steps[first]
    with pytest.raises(ValueError, match="deadlock"):
        check([replace(schedules[0], steps=tuple(steps)), *schedules[1:]])


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_issue_order_records_before_it_waits(name: str, transport: str) -> None:
    """On CUDA a wait for an event that was not recorded yet would be no wait at all."""
    options = {"slots": 4} if name == "all_gather_linear" else {}
    for schedule in build(name, transport, 4, 3, **options):
        seen: set[str] = set()
        for step in schedule.steps:
            assert set(step.waits) <= seen, step.name
            seen.add(step.name)
        assert schedule.steps[0].stream == schedule.steps[-1].stream == CALLER


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_bytes_moved_are_minimal(name: str, transport: str) -> None:
    """Every rank sends each of its (R - 1) C pieces once a collective, and no more."""
    size, pieces = 5, 3
    collectives = 2 if name == "all_gather_linear_backward" else 1
    for schedule in build(name, transport, size, pieces):
        exchanges = [s for s in schedule.steps if s.is_exchange or s.pull_from >= 0]
        assert len(exchanges) == collectives * (size - 1) * pieces
        assert all(step.stream == COMMUNICATION for step in exchanges)


def test_own_chunk_first_and_own_rows_last() -> None:
    """all_gather_linear starts without waiting; linear_reduce_scatter leaves nothing to send last."""
    gather = SCHEDULES["all_gather_linear"](rank=2, size=4, pieces=2)
    matmuls = [step for step in gather.steps if step.stream in COMPUTE]
    assert matmuls[0].chunk == (2, -1) and matmuls[0].waits == ("fork",)
    assert [step.chunk[0] for step in matmuls[1:]] == [3, 3, 0, 0, 1, 1]
    scatter = SCHEDULES["linear_reduce_scatter"](rank=2, size=4, pieces=1)
    partials = [step.chunk for step in scatter.steps if step.action == "partial"]
    assert partials == [(3, 0), (0, 0), (1, 0), (2, 0)]


def test_matmuls_alternate_between_the_compute_streams() -> None:
    schedule = all_gather_linear(rank=0, size=4, pieces=2)
    streams = [step.stream for step in schedule.steps if step.action == "matmul"]
    assert set(streams) == set(COMPUTE)
    per_stream = {s: [x.chunk for x in schedule.steps if x.stream == s] for s in COMPUTE}
    assert abs(len(per_stream["compute0"]) - len(per_stream["compute1"])) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "size": 4, "pieces": 1}, "rank: expected 0..3, got 4"),
        ({"rank": 0, "size": 0, "pieces": 1}, "size: expected at least 1"),
        ({"rank": 0, "size": 2, "pieces": -1}, "pieces: expected 0"),
        ({"rank": 0, "size": 2, "pieces": 1, "transport": "tree"}, "transport: expected one of"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        all_gather_linear(**options)
