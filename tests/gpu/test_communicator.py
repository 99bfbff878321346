"""The NCCL communicator on several GPUs: bits, streams, graphs, sub-groups, and what happens when a
peer dies or stops."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from pyparallel.comm.communicator import PeerError
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.launch import RankError
from tests.gpu.ranks import run_on_gpus, several, world_sizes

pytestmark = [pytest.mark.gpu, several]


def inputs(size: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, generator=generator).to(dtype) for _ in range(size)]


def ordered_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def collectives(c: NcclCommunicator, dtype: torch.dtype, n: int) -> None:
    data = inputs(c.size, n, dtype)
    counts = [n // c.size + (r < n % c.size) for r in range(c.size)]
    total = ordered_sum(data)
    mine = data[c.rank].cuda()
    for asynchronous in (False, True):
        reduced = mine.clone()
        work = c.all_reduce(reduced, async_op=asynchronous)
        if asynchronous:
            work.wait()
        assert torch.equal(reduced.cpu(), total)
        part = torch.empty(counts[c.rank], dtype=dtype, device="cuda")
        work = c.reduce_scatter(part, mine, counts=counts, async_op=asynchronous)
        if asynchronous:
            work.wait()
        assert torch.equal(part.cpu(), total.split(counts)[c.rank])
        gathered = torch.empty(n, dtype=dtype, device="cuda")
        work = c.all_gather(gathered, part, counts=counts, async_op=asynchronous)
        if asynchronous:
            work.wait()
        assert torch.equal(gathered.cpu(), total)
    received = torch.empty(counts[c.rank] * c.size, dtype=dtype, device="cuda")
    c.all_to_all(received, mine, output_counts=[counts[c.rank]] * c.size, input_counts=counts)
    want = torch.cat([d.split(counts)[c.rank] for d in data])
    assert torch.equal(received.cpu(), want)
    c.broadcast(mine, c.size - 1)
    assert torch.equal(mine.cpu(), data[-1])
    c.barrier()


@pytest.mark.parametrize("size", world_sizes())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 1000, 1 << 20])
def test_collectives_give_the_ordered_bits(size, dtype, n) -> None:
    run_on_gpus(collectives, size, dtype, n)


def captured(c: NcclCommunicator) -> None:
    x = torch.zeros(4096, device="cuda")
    c.all_reduce(x)
    c.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.all_reduce(x)
    for step in range(4):
        x.fill_(float(c.rank + step))
        graph.replay()
        c.synchronize()
        assert torch.equal(x.cpu(), torch.full((4096,), sum(r + step for r in range(c.size)) * 1.0))


def test_graph_capture() -> None:
    run_on_gpus(captured, 2)


def split(c: NcclCommunicator) -> None:
    half = c.split(c.rank % 2, c.rank, "half")
    x = torch.full((8,), float(c.rank), device="cuda")
    half.all_reduce(x)
    want = float(sum(r for r in range(c.size) if r % 2 == c.rank % 2))
    assert torch.equal(x.cpu(), torch.full((8,), want))
    half.close()


@pytest.mark.parametrize("size", world_sizes())
def test_split(size) -> None:
    run_on_gpus(split, size)


def survivor(c: NcclCommunicator, how: str, n: int) -> tuple[float, str, tuple[int, ...]] | None:
    x = torch.ones(n, device="cuda")
    c.all_reduce(x)
    c.synchronize()
    if c.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(40)
        return None
    started = time.monotonic()
    try:
        c.all_reduce(x)
        c.synchronize()
    except PeerError as error:
        try:
            c.all_reduce(x)
        except PeerError as again:
            assert str(again) == str(error)
            return time.monotonic() - started, str(error), error.missing
    raise AssertionError("the lost peer was not noticed")


# Small messages go through peer memory where there is some, large ones through NCCL.
sizes = pytest.mark.parametrize("n", [1 << 10, 1 << 23])


@sizes
def test_a_killed_peer_ends_the_others(n) -> None:
    with pytest.raises(RankError) as error:
        run_on_gpus(survivor, 2, "killed", n)
    assert error.value.rank == 1


@sizes
def test_a_stuck_peer_is_named_at_the_timeout(n) -> None:
    results = run_on_gpus(survivor, 2, "stuck", n)
    seconds, text, missing = results[0]
    assert 15 < seconds < 30 and " #" in text and missing == (1,)
