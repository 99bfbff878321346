"""What one rank measures of one engine: seconds a call, as means of short blocks of calls.

Used by the ranks of :mod:`bench.comm.collectives` and, as a script under mpiexec, by Intel MPI's; so
that both measure alike, pinned to the cores alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

BLOCKS = 15
# A block is long enough to read the clock for, short enough that 15 fit between two disturbances.
BLOCK_S = 2e-3
MAX_CALLS = 200

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")


def pin(rank: int) -> None:
    """Give each rank a core of its own, as Intel MPI does; with more ranks than cores, by turns."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def calls_for(seconds: float) -> int:
    """Calls in a block, from the time of one; must come out alike on all ranks."""
    return max(1, min(MAX_CALLS, int(BLOCK_S / seconds)))


def block(call: Callable[[], None], calls: int) -> float:
    """Mean seconds of a call in one block."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _intel_mpi(sizes: list[int]) -> None:
    """One rank under mpiexec: prints {operation: {bytes: samples}} on rank 0."""
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    pin(comm.rank)
    results: dict[str, dict[int, list[float]]] = {}
    for operation in OPERATIONS:
        for num_bytes in sizes:
            x = np.zeros(num_bytes // 4, dtype=np.float32)
            whole = np.zeros_like(x)
            part = x[: len(x) // comm.size]
            call = {
                "all_reduce": lambda x=x: comm.Allreduce(MPI.IN_PLACE, x),
                "all_gather": lambda part=part, whole=whole: comm.Allgather(part, whole),
                "reduce_scatter": lambda part=part, whole=whole: comm.Reduce_scatter_block(
                    whole, part
                ),
            }[operation]
            x += comm.rank
            call()
            if operation == "all_reduce":
                assert (x == sum(range(comm.size))).all()
                x[:] = 0
            calls = calls_for(comm.bcast(block(call, 3)))
            samples = [block(call, calls) for _ in range(BLOCKS)]
            results.setdefault(operation, {})[num_bytes] = samples
    if comm.rank == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    _intel_mpi([int(size) for size in sys.argv[1:]])
