"""Groups that span machines when a rank dies amid slices, or disagrees."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.hierarchical import LONGEST_SLICE, HierarchicalCommunicator
from tests.comm.faults import Report, one_call, run_with_faults

# Elements of fp32 that are more slices than a pipeline of two machines has stages.
MANY_SLICES = 8 * LONGEST_SLICE // 4


def dies(comm: Communicator, operation: str, victim: int, path: str) -> None:
    assert isinstance(comm, HierarchicalCommunicator)
    one_call(comm, operation, MANY_SLICES // comm.size)
    if comm.rank == victim:

        def kill() -> None:
            time.sleep(0.05)
            Path(path).write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    while True:
        one_call(comm, operation, MANY_SLICES // comm.size)


@pytest.mark.parametrize(
    ("operation", "machines", "victim"),
    [
        ("reduce_scatter", "aabb", 3),
        ("all_gather", "abbb", 0),
        pytest.param("broadcast", "aabb", 0, marks=pytest.mark.slow),
    ],
)
def test_a_rank_killed_amid_slices_is_noticed(
    operation: str, machines: str, victim: int, tmp_path: Path
) -> None:
    path = tmp_path / "killed_at"
    results = run_with_faults(
        dies, 4, operation, victim, str(path), timeout_s=60, machines=machines
    )
    killed_at = float(path.read_text())
    assert results.pop(victim) == "lost"
    for rank, report in results.items():
        assert isinstance(report, Report), (rank, report)
        # Far from the timeout: a rank that only waits for another survivor hears of it from him.
        assert report.raised_at - killed_at < 5, (rank, report)
        assert report.missing and rank not in report.missing, (rank, report)
        assert report.afterwards == report.message
    assert any(victim in report.missing for report in results.values()), results


def disagrees(comm: Communicator) -> None:
    x = torch.ones(MANY_SLICES // 4)
    comm.all_reduce(x, op="sum")
    comm.all_reduce(x, op="max" if comm.rank == 1 else "sum")


def test_neighbours_that_make_other_calls_are_told() -> None:
    results = run_with_faults(disagrees, 4, timeout_s=20, machines="aabb")
    assert all(isinstance(report, Report) for report in results.values()), results
    # Who was waiting for the network then hears of it from there.
    told = [results[rank].message for rank in (0, 1)]
    assert any("all ranks must make the same calls" in message for message in told), results
