"""The traces of all ranks as one, in the format that Perfetto and chrome://tracing read.

An event's ``pid`` is its rank, so that each rank is a process; a rank's GPUs and torch's own spans are
processes behind those of all ranks. Times are microseconds since the earliest event.

A collective is waiting until the last rank of its group has begun it, and moving from then on:

    waiting_r = min(end_r, max over ranks of start) - start_r,    moving_r = end_r - start_r - waiting_r

Format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyparallel.profiling.named import Call, readable

Event = dict[str, Any]
# The first track of waiting and moving in a rank's process; torch's have thread ids.
TRACK = 1


@dataclass(frozen=True)
class RankTrace:
    """What one rank traced.

    Attributes:
        pid: of its process.
        trace: as torch.profiler exported it.
        calls: its collectives.
        ahead_ns: of its clock, before the first rank's.
    """

    rank: int
    pid: int
    trace: dict[str, Any]
    calls: list[Call]
    ahead_ns: int


def merge(traces: Sequence[RankTrace]) -> dict[str, Any]:
    """``traceEvents`` of all ranks, and the sums of waiting and moving as ``collectives``."""
    processes = _Processes(traces)
    events = []
    for trace in traces:
        base = (int(trace.trace.get("baseTimeNanoseconds", 0)) - trace.ahead_ns) / 1000
        for event in trace.trace["traceEvents"]:
            moved = {**event, "pid": processes.of(trace.rank, event.get("pid"))}
            if "ts" in event:
                moved["ts"] = base + float(event["ts"])
            # What connects a launch with its kernel is counted by each rank from 0.
            if "id" in event:
                moved["id"] = f"{trace.rank}:{event['id']}"
            if event.get("ph") != "M" or event.get("name", "").startswith("thread"):
                events.append(moved)
    split = list(_split(traces))
    events += [event for _, event in split if event["dur"] > 0]
    tracks = {(event["pid"], event["tid"]) for _, event in split}
    timed = [event["ts"] for event in events if event.get("ph") != "M" and "ts" in event]
    first = min(timed, default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] -= first
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "traceEvents": [*processes.names(), *_tracks(tracks), *events],
        "collectives": _sums(split),
    }


class _Processes:
    """A number for each rank's own process, and for what else torch calls one."""

    def __init__(self, traces: Sequence[RankTrace]) -> None:
        self._own = {trace.rank: trace.pid for trace in traces}
        self._others: dict[tuple[int, Any], int] = {}

    def of(self, rank: int, pid: Any) -> int:
        if pid == self._own[rank]:
            return rank
        return self._others.setdefault((rank, pid), len(self._own) + len(self._others))

    def names(self) -> list[Event]:
        """What the processes are called, and their order."""
        named = {rank: f"rank {rank}" for rank in self._own}
        for (rank, pid), number in self._others.items():
            named[number] = f"rank {rank}: {f'GPU {pid}' if isinstance(pid, int) else pid}"
        events = []
        for number, name in named.items():
            events.append(_meta("process_name", number, 0, {"name": name}))
            events.append(_meta("process_sort_index", number, 0, {"sort_index": number}))
        return events


def _tracks(tracks: Iterable[tuple[int, int]]) -> Iterator[Event]:
    for pid, tid in sorted(tracks):
        yield _meta("thread_name", pid, tid, {"name": "collectives: waiting, moving"})
        yield _meta("thread_sort_index", pid, tid, {"sort_index": tid - 100})


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _split(traces: Iterable[RankTrace]) -> Iterator[tuple[Call, Event]]:
    """Slices of waiting and moving, in microseconds, with the calls they are parts of."""
    together: dict[tuple[Any, ...], dict[int, Call]] = defaultdict(dict)
    ahead = {}
    for trace in traces:
        ahead[trace.rank] = trace.ahead_ns
        for call in trace.calls:
            key = (call.op, call.group, tuple(call.ranks), call.number)
            together[key][trace.rank] = call
    whole = [
        (max(call.start_ns - ahead[rank] for rank, call in calls.items()), rank, call, calls)
        for (_, _, ranks, _), calls in together.items()
        if set(calls) == set(ranks)
        for rank, call in calls.items()
    ]
    ends: dict[int, list[int]] = defaultdict(list)
    for met, rank, call, calls in sorted(whole, key=lambda each: each[2].start_ns):
        start, end = call.start_ns - ahead[rank], call.end_ns - ahead[rank]
        met = min(end, met)
        tid = _track(ends[rank], start, end)
        args = {"bytes": call.num_bytes, "size": readable(call.num_bytes), "group": call.group}
        args["last rank"] = max(calls, key=lambda other: calls[other].start_ns - ahead[other])
        for what, begin, stop in (("waiting", start, met), ("moving", met, end)):
            yield (
                call,
                {
                    "ph": "X",
                    "cat": what,
                    "name": f"{what}: {call.op} {call.group}",
                    "pid": rank,
                    "tid": tid,
                    "ts": begin / 1000,
                    "dur": (stop - begin) / 1000,
                    "args": args,
                },
            )


def _track(ends: list[int], start: int, end: int) -> int:
    """The first of a rank's tracks that is free: slices of one track may not overlap."""
    for number, busy_until in enumerate(ends):
        if busy_until <= start:
            ends[number] = end
            return TRACK + number
    ends.append(end)
    return TRACK + len(ends) - 1


def _sums(split: Iterable[tuple[Call, Event]]) -> list[dict[str, Any]]:
    """By rank, operation and group: calls, bytes, and the milliseconds of each part."""
    sums: dict[tuple[int, str, str], dict[str, Any]] = {}
    for call, event in split:
        key = (event["pid"], call.op, call.group)
        held = sums.setdefault(key, {"calls": 0, "bytes": 0, "waiting_ms": 0.0, "moving_ms": 0.0})
        held[f"{event['cat']}_ms"] += event["dur"] / 1000
        if event["cat"] == "moving":
            held["calls"] += 1
            held["bytes"] += call.num_bytes
    return [
        {"rank": rank, "op": op, "group": group, **held}
        for (rank, op, group), held in sorted(sums.items())
    ]
