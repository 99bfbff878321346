"""Schedules: what a communication/matmul pipeline does, in which order, on which stream.

A schedule is data. It holds no tensor, no device and no clock, so the very list that drives the CUDA
streams is also checked for races (`check.py`), executed on CPU ranks with random delays
(`simulate.py`) and priced (`timing.py`) on machines without a GPU.

Rules of the model, which are CUDA's: steps of one stream run in order; steps of different streams are
ordered only by events; a step starts when the steps named in `waits` have ended. Every step can be
waited for under its own name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

CALLER = "caller"
COMPUTE = ("compute0", "compute1")
COMMUNICATION = "communication"
STREAMS = (CALLER, *COMPUTE, COMMUNICATION)

# A buffer name and the indices of the part of it that is meant, e.g. ("gathered", source, piece).
Region = tuple[str | int, ...]


@dataclass(frozen=True)
class Step:
    """One launch on one stream.

    action: what to run; a pipeline maps it to a function (`copy`, `exchange`, `matmul`, ...).
    chunk: which part it works on, as (rank, piece); piece -1 means all pieces of that rank.
    send_to / receive_from: the peers of an exchange, else -1.
    send_chunk / receive_chunk: what goes out and what comes in, as (rank, piece).
    pull_from: the peer out of whose memory the step copies `remote_reads`, else -1.
    reads, writes: every region the step touches on its own rank.
    call: which of several calls in a row the step belongs to (`check.py` looks at two).
    """

    name: str
    action: str
    stream: str
    chunk: tuple[int, int] = (-1, -1)
    waits: tuple[str, ...] = ()
    send_to: int = -1
    receive_from: int = -1
    send_chunk: tuple[int, int] = (-1, -1)
    receive_chunk: tuple[int, int] = (-1, -1)
    pull_from: int = -1
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    remote_reads: tuple[Region, ...] = ()
    call: int = 0

    @property
    def is_exchange(self) -> bool:
        """Whether the step sends to one peer and receives from another."""
        return self.send_to >= 0

    @property
    def is_meeting(self) -> bool:
        """Whether the step ends on no rank before it has started on all."""
        return self.action == "meet"


@dataclass(frozen=True)
class Schedule:
    """The steps of one rank in issue order, from the fork off the caller's stream to the join.

    inputs: regions that hold data before the first step; outputs: regions the caller reads after the
    last one.
    """

    operation: str
    rank: int
    size: int
    pieces: int
    steps: tuple[Step, ...]
    inputs: tuple[Region, ...]
    outputs: tuple[Region, ...]

    def awaited(self) -> frozenset[str]:
        """Names of the steps whose end some other step waits for: the events that must exist."""
        return frozenset(name for step in self.steps for name in step.waits)


@dataclass
class Builder:
    """Collects steps, forks the streams off the caller's and joins them to it again."""

    operation: str
    rank: int
    size: int
    pieces: int
    steps: list[Step] = field(default_factory=list)
    compute_launches: int = 0

    def __post_init__(self) -> None:
        check_sizes(rank=self.rank, size=self.size, pieces=self.pieces)
        self.steps.append(Step(name="fork", action="fork", stream=CALLER))

    def add(self, step: Step) -> str:
        """Appends a step; the first one on a stream waits for the fork."""
        if all(earlier.stream != step.stream for earlier in self.steps):
            step = replace(step, waits=("fork", *step.waits))
        self.steps.append(step)
        return step.name

    def next_compute(self) -> str:
        """The compute streams in turn, so that a chunk's last wave overlaps the next one's first."""
        stream = COMPUTE[self.compute_launches % len(COMPUTE)]
        self.compute_launches += 1
        return stream

    def finish(self, *, inputs: tuple[Region, ...], outputs: tuple[Region, ...]) -> Schedule:
        """Joins every used stream to the caller's and freezes the result.

        The caller's stream is what has written the inputs and will read the outputs.
        """
        self.steps[0] = replace(self.steps[0], writes=inputs)
        last = {step.stream: step.name for step in self.steps if step.stream != CALLER}
        self.steps.append(
            Step(
                name="join", action="join", stream=CALLER, waits=tuple(last.values()), reads=outputs
            )
        )
        return Schedule(
            operation=self.operation,
            rank=self.rank,
            size=self.size,
            pieces=self.pieces,
            steps=tuple(issue_order(self.steps)),
            inputs=inputs,
            outputs=outputs,
        )


def check_sizes(*, rank: int, size: int, pieces: int) -> None:
    """Raises ValueError unless 0 <= rank < size and pieces >= 0 (0 means: do not overlap)."""
    if size < 1:
        raise ValueError(f"size: expected at least 1 rank, got {size}")
    if not 0 <= rank < size:
        raise ValueError(f"rank: expected 0..{size - 1}, got {rank}")
    if pieces < 0:
        raise ValueError(
            f"pieces: expected 0 (not overlapped) or the number of pieces a shard is cut into, "
            f"got {pieces}"
        )


def issue_order(steps: list[Step]) -> list[Step]:
    """Issue order in which every step comes after the steps it waits for.

    A CUDA event must be recorded before a stream can be told to wait for it. The order within each
    stream is kept: only the merge of the streams changes.
    """
    queues: dict[str, list[Step]] = {}
    for step in steps:
        queues.setdefault(step.stream, []).append(step)
    issued: list[Step] = []
    names: set[str] = set()
    while len(issued) < len(steps):
        ready = [q for q in queues.values() if q and all(name in names for name in q[0].waits)]
        if not ready:
            heads = [q[0].name for q in queues.values() if q]
            raise ValueError(f"schedule: steps {heads} wait for one another; this is a deadlock")
        for queue in ready:
            step = queue.pop(0)
            issued.append(step)
            names.add(step.name)
    return issued
