"""The shared-memory engine leaves nothing behind and does not grow, however many calls are made."""

from __future__ import annotations

import os
import random
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.launch import launch
from tests.comm.faults import one_call


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
        # The descriptor by which a rank sees its launcher's end was there before.
        assert before == after == (1, 0)
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
