"""How much communication stays exposed, and which number of pieces is best: the model, or measurements.

Exposed time is what a path takes beyond its matmul alone; hidden = 1 - exposed / communication.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyparallel.overlap.all_gather_linear import all_gather_linear
from pyparallel.overlap.linear_reduce_scatter import linear_reduce_scatter
from pyparallel.overlap.pipelines import even_rows
from pyparallel.overlap.schedule import Schedule
from pyparallel.overlap.timing import H100, Machine, Timeline, Workload, matmul_seconds, simulate

# Pieces a shard may be cut into; 0 is the path that does not overlap.
CANDIDATES = (0, 1, 2, 4, 8)
# A library multiplies 512 rows in another order than 1024: with whole shards as chunks the overlapped
# path has the matmuls of the plain one, and so its bits. More pieces need a matmul whose rows do not
# depend on how many there are, such as a Triton kernel of fixed tiles.
LIBRARY_CANDIDATES = (0, 1)
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
    return Workload(rows=even_rows(m, size), k=k, n=n, moved_columns=moved)


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


@lru_cache(maxsize=4096)
def choose_pieces(
    operation: str,
    *,
    m: int,
    k: int,
    n: int,
    size: int,
    machine: Machine = H100,
    candidates: tuple[int, ...] = CANDIDATES,
) -> int:
    """The fastest candidate by the model; 0 wins ties, so overlapping is never a loss by it."""
    if size == 1:
        return 0
    shape = {"m": m, "k": k, "n": n, "size": size, "machine": machine}
    least_rows = min(rows for rows, _, _ in machine.tiles)
    usable = [c for c in candidates if c == 0 or m // size // c >= least_rows]
    return min(usable, key=lambda c: (predict(operation, **shape, pieces=c).total, c))


class PiecesTable:
    """Measured choices, by operation and shape; the model where nothing was measured.

    The file is JSON: a list of {"operation", "size", "m", "k", "n", "seconds": {pieces: seconds}}.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        machine: Machine = H100,
        candidates: tuple[int, ...] = CANDIDATES,
    ) -> None:
        self.machine, self.candidates = machine, candidates
        self.measured: dict[tuple[str, int, int, int, int], dict[int, float]] = {}
        if path is not None:
            self.read(path)

    def read(self, path: Path) -> None:
        """Adds the measurements of a file. Raises ValueError if an entry is not as documented."""
        for position, entry in enumerate(json.loads(path.read_text())):
            try:
                key = (entry["operation"], *(int(entry[name]) for name in ("size", "m", "k", "n")))
                seconds = {int(c): float(t) for c, t in entry["seconds"].items()}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path}: entry {position}: expected operation, size, m, k, n and seconds by "
                    f"pieces, got {entry!r}"
                ) from error
            if 0 not in seconds:
                raise ValueError(
                    f"{path}: entry {position}: expected a measurement for 0 pieces (the plain path), "
                    f"got {sorted(seconds)}"
                )
            self.measured[key] = seconds

    def pieces(self, operation: str, *, m: int, k: int, n: int, size: int) -> int:
        """What to cut a shard into. Never a choice that was measured, or is predicted, to lose."""
        seconds = self.measured.get((operation, size, m, k, n))
        if seconds is not None:
            usable = [c for c in seconds if c in self.candidates or c == 0]
            return min(usable, key=lambda c: (seconds[c], c))
        return choose_pieces(
            operation, m=m, k=k, n=n, size=size, machine=self.machine, candidates=self.candidates
        )
