"""What a schedule costs: an event simulation of all ranks with given matmul and link speeds.

Model, all of it declared in `machine.py`:

- A matmul of m rows is ceil(m / TILE_M) * ceil(N / TILE_N) tiles, each 2 TILE_M TILE_N K flops on one
  multiprocessor at peak * efficiency * tile efficiency / SMs. Tiles of both compute streams share the
  multiprocessors first come, first served, so a short last wave of one chunk is filled by the next
  chunk. All matmuls of a schedule use one tile shape, that with which the whole ends first, as a tuned
  kernel would.
- An exchange takes latency + bytes / link; it starts when both sides have reached it. A schedule that
  exchanges holds `communication_sms` multiprocessors for good: a kernel drives the link.
- A copy out of a peer's memory takes copy_latency + bytes / link and holds nothing: a copy engine drives
  it. A meeting takes `meeting` once all ranks have reached it, and holds one warp, which is nothing.
- A reduction is bound by memory, bytes / memory bandwidth, and holds `reduction_sms` meanwhile.
- Every launch costs `launch` on its stream.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from pyparallel.overlap.layout import Layout
from pyparallel.overlap.machine import Machine, Tile
from pyparallel.overlap.schedule import CALLER, COMMUNICATION, Schedule, Step


@dataclass(frozen=True)
class Workload:
    """One linear layer: rows M of all ranks, K and N of this rank's matmul, bytes of an element.

    moved_columns: columns of the rows that travel: K for a gather, N for a scatter.
    """

    rows: tuple[int, ...]
    k: int
    n: int
    moved_columns: int
    element: int = 2


@dataclass(frozen=True)
class Span:
    """When one step ran."""

    rank: int
    stream: str
    name: str
    action: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of all ranks, and when the last of them ended."""

    spans: tuple[Span, ...]
    total: float


def matmul_seconds(machine: Machine, rows: int, k: int, n: int) -> float:
    """One matmul alone on all multiprocessors: whole waves of tiles of the best shape."""
    waves = (
        -(-_tiles(tile, rows, n) // machine.multiprocessors) * _tile_seconds(machine, tile, k)
        for tile in machine.tiles
    )
    return machine.launch + min(waves)


def simulate(schedules: Sequence[Schedule], work: Workload, machine: Machine) -> Timeline:
    """Runs the schedules of all ranks against the clock of the model.

    One schedule alone stands for R equal ranks: its peers are where it is.
    """
    runs = (_Simulation(schedules, work, machine, tile).run() for tile in machine.tiles)
    return min(runs, key=lambda timeline: timeline.total)


def _tiles(tile: Tile, rows: int, columns: int) -> int:
    return -(-rows // tile[0]) * -(-columns // tile[1])


def _tile_seconds(machine: Machine, tile: Tile, k: int) -> float:
    speed = machine.peak * machine.efficiency / machine.multiprocessors
    return 2.0 * tile[0] * tile[1] * k / (speed * tile[2])


class _Simulation:
    def __init__(
        self, schedules: Sequence[Schedule], work: Workload, machine: Machine, tile: Tile
    ) -> None:
        self.schedules, self.work, self.machine, self.tile = schedules, work, machine, tile
        self.layout = Layout(work.rows, pieces=schedules[0].pieces)
        exchanging = any(step.is_exchange for step in schedules[0].steps)
        sms = machine.multiprocessors - (machine.communication_sms if exchanging else 0)
        # When each multiprocessor of each rank is free again, earliest first.
        self.free = [[0.0] * sms for _ in schedules]
        self.ended: dict[tuple[int, str], float] = {}
        self.exchanges = {s.rank: [x for x in s.steps if x.is_exchange] for s in schedules}
        self.stream_free = {
            (s.rank, stream): 0.0 for s in schedules for stream in {x.stream for x in s.steps}
        }
        self.spans: list[Span] = []

    def run(self) -> Timeline:
        queues = {
            (s.rank, stream): [step for step in s.steps if step.stream == stream]
            for s in self.schedules
            for stream in {step.stream for step in s.steps}
        }
        while any(queues.values()):
            # Of the steps that can run, the one that starts first: multiprocessors are taken in order.
            ready = [
                (start, key)
                for key, queue in queues.items()
                if queue and (start := self._ready_at(key, queue[0], queues)) is not None
            ]
            if not ready:
                raise ValueError("timing: the schedules wait for one another; run check() on them")
            start, key = min(ready)
            self._execute(key, queues[key].pop(0), start)
        return Timeline(tuple(self.spans), max(self.ended.values()))

    def _ready_at(
        self,
        key: tuple[int, str],
        step: Step,
        queues: dict[tuple[int, str], list[Step]],
    ) -> float | None:
        start = self._local_ready(key, step)
        if start is None or len(self.schedules) == 1:
            return start
        if step.is_meeting:
            return self._all_ready_at(step, queues)
        if not step.is_exchange:
            return start
        # The sender's side of what this step receives must have been reached too.
        sender = (step.receive_from, COMMUNICATION)
        position = self._position(key, step)
        matching = self.exchanges[step.receive_from][position]
        done = self.ended.get((step.receive_from, matching.name))
        if done is not None:
            return max(start, done - self._duration(step))
        queue = queues[sender]
        if not queue or queue[0].name != matching.name:
            return None
        peer_start = self._local_ready(sender, queue[0])
        return None if peer_start is None else max(start, peer_start)

    def _local_ready(self, key: tuple[int, str], step: Step) -> float | None:
        start = self.stream_free[key]
        for name in step.waits:
            if (key[0], name) not in self.ended:
                return None
            start = max(start, self.ended[key[0], name])
        return start

    def _all_ready_at(self, step: Step, queues: dict[tuple[int, str], list[Step]]) -> float | None:
        """When the last rank reaches a meeting; None while one has not."""
        latest = 0.0
        for rank in range(len(self.schedules)):
            if (rank, step.name) in self.ended:
                ready = self.ended[rank, step.name] - self.machine.meeting
            else:
                queue = queues[rank, COMMUNICATION]
                if not queue or queue[0].name != step.name:
                    return None
                ready = self._local_ready((rank, COMMUNICATION), queue[0])
            if ready is None:
                return None
            latest = max(latest, ready)
        return latest

    def _position(self, key: tuple[int, str], step: Step) -> int:
        return next(i for i, s in enumerate(self.exchanges[key[0]]) if s.name == step.name)

    def _execute(self, key: tuple[int, str], step: Step, start: float) -> None:
        rank = key[0]
        if step.action in ("matmul", "matmul_all", "partial", "weight_gradient"):
            begin, end = self._matmul(rank, step, start)
        elif step.action == "reduce":
            begin, end = self._reduce(rank, step, start)
        else:
            begin, end = start, start + self._duration(step)
        self.ended[rank, step.name] = end
        self.stream_free[key] = end
        if key[1] != CALLER:
            self.spans.append(Span(rank, key[1], step.name, step.action, begin, end))

    def _matmul(self, rank: int, step: Step, start: float) -> tuple[float, float]:
        free = self.free[rank if len(self.schedules) > 1 else 0]
        rows, inner, columns = self._rows(step), self.work.k, self.work.n
        if step.action == "weight_gradient":
            # [N, M] @ [M, K]: the same flops in another shape.
            rows, inner, columns = columns, rows, inner
        tile = _tile_seconds(self.machine, self.tile, inner)
        start += self.machine.launch
        begin, end = float("inf"), start
        for _ in range(_tiles(self.tile, rows, columns)):
            at = max(heapq.heappop(free), start)
            begin, end = min(begin, at), max(end, at + tile)
            heapq.heappush(free, at + tile)
        return min(begin, end), end

    def _reduce(self, rank: int, step: Step, start: float) -> tuple[float, float]:
        free = self.free[rank if len(self.schedules) > 1 else 0]
        count = min(self.machine.reduction_sms, len(free))
        taken = [heapq.heappop(free) for _ in range(count)]
        # The grid is done when its last block is, and blocks start as multiprocessors come free.
        begin = max(start + self.machine.launch, taken[0])
        end = max(begin, taken[-1]) + self._duration(step)
        for _ in taken:
            heapq.heappush(free, end)
        return begin, end

    def _rows(self, step: Step) -> int:
        if step.action in ("matmul_all", "weight_gradient"):
            return self.layout.total
        rows = self.layout.rows_of(*step.chunk)
        return rows.stop - rows.start

    def _duration(self, step: Step) -> float:
        machine, row_bytes = self.machine, self.work.moved_columns * self.work.element
        own = max(self.layout.rows)
        if step.is_exchange:
            rows = self.layout.local(*step.receive_chunk)
            if step.action == "scatter":
                rows = self.layout.local(step.send_chunk[0], step.send_chunk[1])
            return machine.latency + (rows.stop - rows.start) * row_bytes / machine.link
        if step.is_meeting:
            return machine.meeting
        if step.pull_from >= 0:
            # The chunk names whose rows they are: the source's, or for partial sums the own ones.
            owner = step.chunk[0] if step.action == "pull" else step.remote_reads[0][1]
            rows = self.layout.local(int(owner), step.chunk[1])
            return machine.copy_latency + (rows.stop - rows.start) * row_bytes / machine.link
        if step.action in ("gather_all", "reduce_scatter_all"):
            moved = (self.layout.total - min(self.layout.rows)) * row_bytes / machine.link
            summed = (len(self.work.rows) + 1) * own * row_bytes / machine.memory
            extra = machine.launch + summed if step.action == "reduce_scatter_all" else 0.0
            return machine.latency + moved + extra
        if step.action == "reduce":
            rows = self.layout.local(*step.chunk)
            count = (rows.stop - rows.start) * (len(self.work.rows) + 1)
            return count * row_bytes / machine.memory
        if step.action in ("copy_own", "publish"):
            return machine.launch + 2 * own * row_bytes / machine.memory
        return 0.0
