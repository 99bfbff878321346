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

import psutil
import pytest
import torch
import torch.distributed as dist

from pyparallel.launch import launch
from pyparallel.shared_memory import SharedMemoryCommunicator
from tests.faults import Report, run_with_faults

LENGTH = 3000


def one_call(comm: SharedMemoryCommunicator, operation: str, length: int = LENGTH) -> None:
    x = torch.ones(length)
    whole = torch.ones(length * comm.size)
    if operation == "all_reduce":
        comm.all_reduce(x)
    elif operation == "all_gather":
        comm.all_gather(whole, x)
    elif operation == "reduce_scatter":
        comm.reduce_scatter(x, whole)
    elif operation == "all_to_all":
        comm.all_to_all(torch.empty_like(whole), whole)
    elif operation == "broadcast":
        comm.broadcast(x, comm.size - 1)
    elif operation == "message":
        # Round the ring; a short message waits for nobody, so nobody waits for himself.
        comm.send(x, (comm.rank + 1) % comm.size)
        comm.recv(x, (comm.rank - 1) % comm.size)
    else:
        comm.barrier()


OPERATIONS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
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
        assert report.operation == operation and report.sequence > 0
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


def descriptors_and_maps() -> tuple[int, int]:
    names = [
        os.readlink(f"/proc/self/fd/{fd.name}")
        for fd in os.scandir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd.name}")
    ]
    held = sum("pyparallel" in name or "pidfd" in name for name in names)
    return held, Path("/proc/self/maps").read_text().count("memfd:pyparallel")


def opened_and_closed() -> tuple[tuple[int, int], tuple[int, int], int]:
    before = descriptors_and_maps()
    for index in range(5):
        comm = SharedMemoryCommunicator.create(dist.group.WORLD, f"group{index}")
        one_call(comm, "all_reduce")
        memory = next(
            int(fd.name)
            for fd in os.scandir("/proc/self/fd")
            if "memfd:pyparallel" in os.readlink(f"/proc/self/fd/{fd.name}")
        )
        mode = os.stat(memory).st_mode & 0o777
        comm.close()
        del comm
    return before, descriptors_and_maps(), mode


def test_nothing_is_left_behind() -> None:
    shm = sorted(os.listdir("/dev/shm"))
    for before, after, mode in launch(opened_and_closed, 2):
        assert before == after == (0, 0)
        assert mode == 0o600
    assert sorted(os.listdir("/dev/shm")) == shm


def soak(calls: int) -> tuple[int, int]:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "soak")
    shared = random.Random(3)
    tensors = {n: torch.zeros(n) for n in (1, 256, 2048, 16384)}
    halves = {n: torch.zeros(max(1, n // 2)) for n in tensors}
    wholes = {n: torch.zeros(2 * max(1, n // 2)) for n in tensors}
    process = psutil.Process()
    before = 0
    for call in range(calls):
        if call == calls // 10:
            before = process.memory_info().rss
        n = shared.choice((1, 256, 2048, 16384)) if call % 16 == 0 else 256
        kind = call % 5
        if kind == 0:
            comm.all_reduce(tensors[n], op="max")
        elif kind == 1:
            comm.all_gather(wholes[n], halves[n])
        elif kind == 2:
            comm.reduce_scatter(halves[n], wholes[n], op="min")
        elif kind == 3:
            comm.all_to_all(wholes[n], wholes[n].clone())
        elif comm.rank == 0:
            comm.send(tensors[n], 1, tag=call)
        else:
            comm.recv(tensors[n], 0, tag=call)
    comm.barrier()
    grown = process.memory_info().rss - before
    assert all(not tensor.any() for tensor in tensors.values())
    comm.close()
    return grown, len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "calls", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["short", "million"]
)
def test_soak(calls: int) -> None:
    for grown, descriptors in launch(soak, 2, calls):
        assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB more after {calls} calls"
        assert descriptors < 64


def test_errors_fit_in_a_line() -> None:
    results = run_with_faults(shapes, 2, timeout_s=20)
    pattern = r"all_reduce #1 on group 'victims' \(rank \d of 2\): rank \d calls .+"
    for report in results.values():
        assert re.fullmatch(pattern, report.message), report.message
