"""How much communication stays exposed, by the model.

Exposed time is what a path takes beyond its matmul alone; hidden = 1 - exposed / communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from pyparallel.cut.shares import part_sizes
from pyparallel.overlap.all_gather_linear import all_gather_linear
from pyparallel.overlap.linear_reduce_scatter import linear_reduce_scatter
from pyparallel.overlap.machine import H100, Machine
from pyparallel.overlap.schedule import Schedule
from pyparallel.overlap.timing import Timeline, Workload, matmul_seconds, simulate

OPERATIONS: dict[str, Callable[..., Schedule]] = {
    "all_gather_linear": all_gather_linear,
    "linear_reduce_scatter": linear_reduce_scatter,
}


@dataclass(frozen=True)
class Prediction:
    """Times in seconds of one shape on one machine."""

    operation: str
    pieces: int
    transport: str
    total: float
    matmul: float
    communication: float
    plain: float

    @property
    def exposed(self) -> float:
        """What is added to the matmul."""
        return self.total - self.matmul

    @property
    def hidden(self) -> float:
        """Share of the communication that costs no time; negative if overlapping loses."""
        return 1.0 - self.exposed / self.communication if self.communication > 0 else 1.0


def workload(operation: str, *, m: int, k: int, n: int, size: int) -> Workload:
    """The work of one rank. k, n: of this rank's matmul; M rows over `size` ranks."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation: expected one of {sorted(OPERATIONS)}, got {operation!r}")
    moved = k if operation == "all_gather_linear" else n
    return Workload(rows=tuple(part_sizes(m, size)), k=k, n=n, moved_columns=moved)


def timeline(
    operation: str,
    *,
    m: int,
    k: int,
    n: int,
    size: int,
    pieces: int,
    transport: str = "direct",
    machine: Machine = H100,
) -> Timeline:
    """The simulated run of all ranks."""
    build = OPERATIONS[operation]
    schedules = [
        build(rank=rank, size=size, pieces=pieces, transport=transport) for rank in range(size)
    ]
    return simulate(schedules, workload(operation, m=m, k=k, n=n, size=size), machine)


def _one_rank(
    operation: str,
    *,
    m: int,
    k: int,
    n: int,
    size: int,
    pieces: int,
    transport: str,
    machine: Machine,
) -> float:
    """Rank 0 stands for all: it has the most rows."""
    schedule = OPERATIONS[operation](rank=0, size=size, pieces=pieces, transport=transport)
    work = workload(operation, m=m, k=k, n=n, size=size)
    return simulate([schedule], work, machine).total


@lru_cache(maxsize=4096)
def predict(
    operation: str,
    *,
    m: int,
    k: int,
    n: int,
    size: int,
    pieces: int,
    transport: str = "direct",
    machine: Machine = H100,
) -> Prediction:
    """Prices one choice of pieces and transport beside the path that does not overlap."""
    shape = {"m": m, "k": k, "n": n, "size": size, "machine": machine}
    plain = _one_rank(operation, **shape, pieces=0, transport="direct")
    total = plain
    if pieces > 0:
        total = _one_rank(operation, **shape, pieces=pieces, transport=transport)
    matmul = matmul_seconds(machine, m, k, n)
    return Prediction(operation, pieces, transport, total, matmul, plain - matmul, plain)


@lru_cache(maxsize=256)
def predict_fused(
    *, m: int, k: int, n: int, size: int, copying_sms: int = 16, machine: Machine = H100
) -> Prediction:
    """Prices kernels/collective/all_gather_matmul.py: one kernel, whose tiles start as their rows land.

    Some multiprocessors copy, block of rows after block of rows, the others multiply, with the tile
    that fits beside the flags' registers. `exposed` and `hidden` are against the matmul alone with
    that tile, on all multiprocessors.
    """
    tile = next(tile for tile in machine.tiles if tile[:2] == (128, 128))
    seconds = 2.0 * tile[0] * tile[1] * k
    seconds /= machine.peak * machine.efficiency / machine.multiprocessors * tile[2]
    shard = -(-m // size)
    free = [0.0] * (machine.multiprocessors - copying_sms)
    landed = end = machine.launch + machine.meeting
    for rank in range(size):
        for begin in range(0, shard, tile[0]):
            rows = min(tile[0], shard - begin)
            if rank > 0:
                landed += rows * k * Workload.element / machine.link
            for _ in range(-(-n // tile[1])):
                # Own rows wait for nothing, the others for the copy of their block.
                start = max(heapq.heappop(free), landed if rank > 0 else machine.launch)
                heapq.heappush(free, start + seconds)
                end = max(end, start + seconds)
    matmul = matmul_seconds(replace(machine, tiles=(tile,)), m, k, n)
    plain = predict("all_gather_linear", m=m, k=k, n=n, size=size, pieces=0, machine=machine)
    added = plain.communication
    return Prediction(
        "all_gather_matmul", -(-shard // tile[0]), "fused", end, matmul, added, matmul + added
    )
