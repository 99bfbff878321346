"""The shared-memory engine when ranks die, hang, leave or disagree: bounded, named, nothing leaked."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.launch import launch
from tests.comm.faults import Report, one_call, run_with_faults

OPERATIONS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send",
    "message",
    "barrier",
)


def dies(comm: SharedMemoryCommunicator, operation: str, victim: int, path: str) -> None:
    if comm.rank == victim:

        def kill() -> None:
            time.sleep(random.Random(operation).random() * 0.2)
            Path(path).write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    while True:
        one_call(comm, operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_killed_rank_is_noticed_within_a_second(operation: str, tmp_path: Path) -> None:
    path = tmp_path / "killed_at"
    results = run_with_faults(dies, 3, operation, 1, str(path), timeout_s=60)
    killed_at = float(path.read_text())
    assert results[1] == "lost"
    for rank in (0, 2):
        report = results[rank]
        assert isinstance(report, Report), report
        assert report.raised_at - killed_at < 1.0
        assert report.operation == {"send": "message"}.get(operation, operation)
        assert report.sequence > 0
        assert report.group == "victims"
        assert report.missing == (1,), report
        assert f"rank {rank} of 3" in report.message and "rank 1" in report.message
        assert report.afterwards == report.message


def stops(comm: SharedMemoryCommunicator, operation: str) -> None:
    one_call(comm, operation)
    if comm.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    one_call(comm, operation)


@pytest.mark.parametrize("operation", ["all_reduce", "all_to_all", "barrier"])
def test_a_stopped_rank_is_given_up_at_the_timeout(operation: str) -> None:
    start = time.time()
    results = run_with_faults(stops, 3, operation, timeout_s=1.5)
    for rank in (0, 1):
        report = results[rank]
        assert isinstance(report, Report), report
        assert report.missing == (2,), report
        assert report.sequence == 2
        assert report.raised_at - start > 1.5
        assert "rank 2" in report.message
        assert report.afterwards == report.message
    assert any("within 1.5" in results[rank].message for rank in (0, 1))


def leaves(comm: SharedMemoryCommunicator) -> None:
    if comm.rank == 0:
        comm.close()
        time.sleep(0.5)
        return
    one_call(comm, "all_reduce")


def test_a_rank_that_left_is_named() -> None:
    results = run_with_faults(leaves, 3, timeout_s=60)
    assert results[0] == "ended"
    for rank in (1, 2):
        assert "rank 0 left the group" in results[rank].message
        assert results[rank].missing == (0,)


def shapes(comm: SharedMemoryCommunicator) -> None:
    comm.all_reduce(torch.ones(4 + comm.rank))


def dtypes(comm: SharedMemoryCommunicator) -> None:
    comm.all_reduce(torch.ones(4, dtype=[torch.float32, torch.bfloat16][comm.rank]))


def reductions(comm: SharedMemoryCommunicator) -> None:
    comm.all_reduce(torch.ones(4), op=["sum", "max"][comm.rank])


def operations(comm: SharedMemoryCommunicator) -> None:
    one_call(comm, ["all_reduce", "all_gather"][comm.rank], length=4)


def parts(comm: SharedMemoryCommunicator) -> None:
    counts = [[2, 3], [1, 4]][comm.rank]
    comm.all_gather(torch.ones(5), torch.ones(counts[comm.rank]), counts=counts)


def exchanged(comm: SharedMemoryCommunicator) -> None:
    output_counts = [[1, 2], [3, 2]][comm.rank]
    comm.all_to_all(
        torch.ones(sum(output_counts)),
        torch.ones(3),
        output_counts=output_counts,
        input_counts=[1, 2],
    )


def messages(comm: SharedMemoryCommunicator) -> None:
    if comm.rank == 0:
        comm.send(torch.ones(4), 1, tag=7)
        # Stay until the other has told what it thinks of the message.
        comm.recv(torch.ones(1), 1)
    else:
        comm.recv(torch.ones(5), 0, tag=8)


@pytest.mark.parametrize(
    ("body", "sides"),
    [
        (shapes, ("all_reduce sum of float32[4]", "all_reduce sum of float32[5]")),
        (dtypes, ("all_reduce sum of float32[4]", "all_reduce sum of bfloat16[4]")),
        (reductions, ("all_reduce sum of float32[4]", "all_reduce max of float32[4]")),
        (operations, ("all_reduce sum of float32[4]", "all_gather of float32[8]")),
        (parts, ("all_gather of float32[5] in parts", "in other parts")),
        (exchanged, ("expects 3 elements from rank 0", "rank 0 sends 2")),
        (messages, ("message tag 8 of float32[5]", "message tag 7 of float32[4]")),
    ],
)
def test_calls_that_differ_are_caught_and_both_sides_named(
    body: Callable[[SharedMemoryCommunicator], None], sides: tuple[str, str]
) -> None:
    results = run_with_faults(body, 2, timeout_s=20)
    reports = [result for result in results.values() if isinstance(result, Report)]
    assert reports
    assert any(all(side in report.message for side in sides) for report in reports), reports
    for report in reports:
        assert "\n" not in report.message
        assert report.afterwards == report.message


def interrupted() -> str:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "interrupted")
    if comm.rank == 1:
        time.sleep(1.5)
        return ""
    # launch() lets only the parent take SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        comm.barrier()
    except KeyboardInterrupt:
        return f"{time.monotonic() - start:.2f}"
    return "went on"


def test_ctrl_c_ends_a_wait() -> None:
    assert float(launch(interrupted, 2)[0]) < 1.3


def other_threads() -> int:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "threads")
    ticks = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(1)
            time.sleep(0.01)

    threading.Thread(target=tick, daemon=True).start()
    if comm.rank == 1:
        time.sleep(1.0)
    comm.barrier()
    stop.set()
    comm.close()
    return len(ticks)


def test_other_threads_run_while_a_rank_waits() -> None:
    assert launch(other_threads, 2)[0] > 20


def test_errors_fit_in_a_line() -> None:
    results = run_with_faults(shapes, 2, timeout_s=20)
    pattern = r"all_reduce #1 on group 'victims' \(rank \d of 2\): rank \d calls .+"
    for report in results.values():
        assert re.fullmatch(pattern, report.message), report.message
