"""Proves a set of schedules free of races and deadlocks, for every timing there can be.

The steps of all ranks form one graph with two nodes a step, its start and its end:

    start(a) -> end(a)                     a step takes time
    end(a) -> start(b)                     b follows a on its stream, or waits for a
    start(send at q) -> end(receive at r)  data cannot arrive before the sender started
    start(meet at q) -> end(meet at r)     nobody leaves a meeting before all have come

Two steps that touch the same region of a rank, one of them writing, must be ordered by this graph,
also when one of them belongs to another rank and reads from afar; a region that is read must have been
written before. Nothing else is assumed: no clock, no luck. Deadlocks are looked for in the graph with
the stricter rule of a rendezvous (a send also ends only after the receiver started), as NCCL's grouped
point-to-point kernels may behave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pyparallel.overlap.schedule import Region, Schedule, Step

# A step and the rank that runs it.
Placed = tuple[int, Step]


def check(schedules: Sequence[Schedule], *, calls: int = 1) -> None:
    """Raises ValueError naming the steps and the region of the first fault found.

    schedules: those of rank 0..R-1 of one operation, in rank order.
    calls: how many times in a row, on the same buffers; 2 shows that a call may follow another.
    """
    schedules = [_repeated(schedule, calls) for schedule in schedules]
    graph = _Graph(schedules)
    graph.check_exchanges_match()
    graph.check_meetings_match()
    graph.check_no_deadlock()
    _check_accesses(schedules, graph)


def _repeated(schedule: Schedule, calls: int) -> Schedule:
    """The same steps several times on the same streams; those of later calls are named a#1, a#2, ..."""
    steps = list(schedule.steps)
    for call in range(1, calls):
        steps += [
            replace(
                step,
                name=f"{step.name}#{call}",
                waits=tuple(f"{name}#{call}" for name in step.waits),
                call=call,
            )
            for step in schedule.steps
        ]
    return replace(schedule, steps=tuple(steps))


class _Graph:
    """Reachability between the starts and ends of all steps of all ranks."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.schedules = schedules
        self.node: dict[tuple[int, str], int] = {}
        for schedule in schedules:
            for step in schedule.steps:
                key = (schedule.rank, step.name)
                if key in self.node:
                    raise ValueError(f"rank {schedule.rank}: two steps are named {step.name!r}")
                self.node[key] = 2 * len(self.node)
        self.successors: list[list[int]] = [[] for _ in range(2 * len(self.node))]
        self.reached: list[int] | None = None
        for schedule in schedules:
            self._add_local_edges(schedule)
        self._add_exchange_edges(self.successors, rendezvous=False)
        self._add_meeting_edges()

    def _add_local_edges(self, schedule: Schedule) -> None:
        last: dict[str, int] = {}
        for step in schedule.steps:
            start = self.node[schedule.rank, step.name]
            self.successors[start].append(start + 1)
            if step.stream in last:
                self.successors[last[step.stream] + 1].append(start)
            last[step.stream] = start
            for name in step.waits:
                if (schedule.rank, name) not in self.node:
                    raise ValueError(
                        f"rank {schedule.rank}: step {step.name!r} waits for {name!r}, which does "
                        f"not exist"
                    )
                self.successors[self.node[schedule.rank, name] + 1].append(start)

    def _exchanges(self) -> dict[tuple[int, int], list[tuple[int, Step]]]:
        """Sends by (sender, receiver), in the order of the sender's steps."""
        sends: dict[tuple[int, int], list[tuple[int, Step]]] = {}
        for schedule in self.schedules:
            for step in schedule.steps:
                if step.is_exchange:
                    sends.setdefault((schedule.rank, step.send_to), []).append(
                        (self.node[schedule.rank, step.name], step)
                    )
        return sends

    def _receives(self) -> dict[tuple[int, int], list[tuple[int, Step]]]:
        receives: dict[tuple[int, int], list[tuple[int, Step]]] = {}
        for schedule in self.schedules:
            for step in schedule.steps:
                if step.is_exchange:
                    receives.setdefault((step.receive_from, schedule.rank), []).append(
                        (self.node[schedule.rank, step.name], step)
                    )
        return receives

    def _add_exchange_edges(self, successors: list[list[int]], *, rendezvous: bool) -> None:
        sends, receives = self._exchanges(), self._receives()
        for pair, senders in sends.items():
            for (sender, _), (receiver, _) in zip(senders, receives.get(pair, []), strict=False):
                successors[sender].append(receiver + 1)
                if rendezvous:
                    successors[receiver].append(sender + 1)

    def _meetings(self) -> list[list[Step]]:
        return [[step for step in s.steps if step.is_meeting] for s in self.schedules]

    def _add_meeting_edges(self) -> None:
        for together in zip(*self._meetings(), strict=False):
            nodes = [self.node[r, step.name] for r, step in enumerate(together)]
            for start in nodes:
                self.successors[start] += [node + 1 for node in nodes]

    def check_meetings_match(self) -> None:
        """All ranks meet equally often, and mean the same meetings."""
        names = [[step.name for step in steps] for steps in self._meetings()]
        for rank, mine in enumerate(names):
            if mine != names[0]:
                raise ValueError(f"rank 0 meets for {names[0]}, rank {rank} for {mine}")

    def check_exchanges_match(self) -> None:
        """The n-th send from q to r carries what the n-th receive of r from q expects."""
        sends, receives = self._exchanges(), self._receives()
        for pair in sorted(set(sends) | set(receives)):
            out = [_sent_chunk(step) for _, step in sends.get(pair, [])]
            into = [_received_chunk(step, pair[1]) for _, step in receives.get(pair, [])]
            if out != into:
                raise ValueError(
                    f"rank {pair[0]} sends {out} to rank {pair[1]}, which expects {into}"
                )

    def check_no_deadlock(self) -> None:
        """With every exchange a rendezvous, some step can always run."""
        successors = [list(edges) for edges in self.successors]
        self._add_exchange_edges(successors, rendezvous=True)
        stuck = _cycle_nodes(successors)
        if stuck:
            names = {v: f"rank {r}: {name}" for (r, name), v in self.node.items()}
            who = ", ".join(sorted({names[v & ~1] for v in stuck})[:6])
            raise ValueError(f"deadlock: these steps wait for one another: {who}")

    def before(self, first: Placed, second: Placed) -> bool:
        """Whether `first` has always ended when `second` starts."""
        if self.reached is None:
            self.reached = _reachable(self.successors)
        end = self.node[first[0], first[1].name] + 1
        return bool(self.reached[end] >> self.node[second[0], second[1].name] & 1)

    def ordered(self, a: Placed, b: Placed) -> bool:
        """Whether one of the two has always ended when the other starts."""
        return self.before(a, b) or self.before(b, a)


def _sent_chunk(step: Step) -> tuple[str, int, int]:
    return (step.action, *step.send_chunk)


def _received_chunk(step: Step, receiver: int) -> tuple[str, int, int]:
    # A partial sum is named by its destination where it is sent and by its source where it lands.
    owner = receiver if step.action == "scatter" else step.receive_chunk[0]
    return (step.action, owner, step.receive_chunk[1])


def _topological(successors: list[list[int]]) -> list[int]:
    degree = [0] * len(successors)
    for edges in successors:
        for v in edges:
            degree[v] += 1
    order = [v for v, d in enumerate(degree) if d == 0]
    for v in order:
        for w in successors[v]:
            degree[w] -= 1
            if degree[w] == 0:
                order.append(w)
    return order


def _cycle_nodes(successors: list[list[int]]) -> set[int]:
    return set(range(len(successors))) - set(_topological(successors))


def _reachable(successors: list[list[int]]) -> list[int]:
    reached = [0] * len(successors)
    for v in reversed(_topological(successors)):
        bits = 1 << v
        for w in successors[v]:
            bits |= reached[w]
        reached[v] = bits
    return reached


def _check_accesses(schedules: Sequence[Schedule], graph: _Graph) -> None:
    readers: dict[tuple[int, Region], list[Placed]] = {}
    writers: dict[tuple[int, Region], list[Placed]] = {}
    for schedule in schedules:
        for step in schedule.steps:
            placed = (schedule.rank, step)
            for region in step.reads:
                readers.setdefault((schedule.rank, region), []).append(placed)
            for region in step.remote_reads:
                readers.setdefault((step.pull_from, region), []).append(placed)
            for region in step.writes:
                writers.setdefault((schedule.rank, region), []).append(placed)
    for (rank, region), steps in readers.items():
        for reader in steps:
            written = writers.get((rank, region), [])
            _check_ordered(rank, region, reader, written, graph)
            _check_source(rank, region, reader, written, graph)
    for (rank, region), steps in writers.items():
        for position, writer in enumerate(steps):
            _check_ordered(rank, region, writer, steps[position + 1 :], graph)


def _check_ordered(
    rank: int, region: Region, step: Placed, others: Sequence[Placed], graph: _Graph
) -> None:
    for other in others:
        if other == step or graph.ordered(step, other):
            continue
        raise ValueError(
            f"rank {rank}: {_name(step, rank)} and {_name(other, rank)} touch {region} at the same "
            f"time"
        )


def _check_source(
    rank: int, region: Region, reader: Placed, writers: Sequence[Placed], graph: _Graph
) -> None:
    """The region was written before it is read, and holds the chunk and the call the reader means."""
    earlier = [w for w in writers if graph.before(w, reader)]
    if not earlier:
        raise ValueError(
            f"rank {rank}: {_name(reader, rank)} reads {region}, which nothing has written"
        )
    # Writers of one region are ordered (checked above), so one of the earlier ones is the last.
    last = next(w for w in earlier if all(w is o or graph.before(o, w) for o in earlier))[1]
    step = reader[1]
    if last.call != step.call:
        raise ValueError(
            f"rank {rank}: {_name(reader, rank)} of call {step.call} reads {region}, which "
            f"{last.name!r} of call {last.call} wrote"
        )
    if sum(w.call == step.call for _, w in writers) > 1:
        wanted = step.send_chunk if step.is_exchange else step.chunk
        if _written_chunk(last) != wanted:
            raise ValueError(
                f"rank {rank}: {_name(reader, rank)} expects chunk {wanted} in {region}, which "
                f"holds {_written_chunk(last)}"
            )


def _written_chunk(step: Step) -> tuple[int, int]:
    return step.receive_chunk if step.is_exchange else step.chunk


def _name(placed: Placed, rank: int) -> str:
    return repr(placed[1].name) + ("" if placed[0] == rank else f" of rank {placed[0]}")
