"""The ranks of one host in a measurement of several: ``python -m bench.comm.machines_ranks JOB.json``.

One process a host, whose number is ``RANK``; it forks the host's ranks. Rank 0 writes what was found.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bench.comm.collectives_ranks import calls_for
from pyparallel.comm.communicator import Communicator
from pyparallel.comm.connect import connect

ENGINES = ("pyparallel", "gloo")


@dataclass(frozen=True)
class Job:
    """What to measure, and where to write it.

    Attributes:
        ranks: of each host.
        operations: of ``all_reduce, reduce_scatter, all_gather, broadcast``.
        num_bytes: of the whole tensor, in fp32.
        turns: how often the engines take turns.
        engines: of ``pyparallel, gloo``.
        result: the file that is written when all is done.
    """

    ranks: list[int]
    operations: list[str]
    num_bytes: list[int]
    turns: int
    engines: list[str]
    result: str


@dataclass(frozen=True)
class Found:
    """One engine's operation at one size.

    Attributes:
        seconds: of a call, a turn each, by rank 0's clock between barriers.
        cpu_s: of a call, of all ranks together; the median of the turns.
        sent: bytes of a call that left each host, as its network interface counts.
    """

    operation: str
    num_bytes: int
    engine: str
    seconds: list[float]
    cpu_s: float
    sent: list[float]


def calls(comm: Communicator, num_bytes: int) -> dict[tuple[str, str], Callable[[], object]]:
    """Every operation of both engines on zeros, which stay zeros."""
    length = max(num_bytes // 4 // comm.size, 1) * comm.size
    x, part = torch.zeros(length), torch.zeros(length // comm.size)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    last = comm.size - 1
    return {
        ("pyparallel", "all_reduce"): lambda: comm.all_reduce(x),
        ("gloo", "all_reduce"): lambda: dist.all_reduce(x),
        ("pyparallel", "reduce_scatter"): lambda: comm.reduce_scatter(part, x),
        ("gloo", "reduce_scatter"): lambda: scatter(part, x),
        ("pyparallel", "all_gather"): lambda: comm.all_gather(x, part),
        ("gloo", "all_gather"): lambda: gather(x, part),
        ("pyparallel", "broadcast"): lambda: comm.broadcast(x, last),
        ("gloo", "broadcast"): lambda: dist.broadcast(x, last),
    }


def check(comm: Communicator) -> None:
    """That the sums are right, before they are timed."""
    x = torch.arange(400_000.0) % 97 + comm.rank
    expected = (torch.arange(400_000.0) % 97) * comm.size + sum(range(comm.size))
    comm.all_reduce(x)
    assert torch.equal(x, expected)


def sent_bytes() -> int:
    """What this host's interface has sent so far."""
    link = os.environ["GLOO_SOCKET_IFNAME"]
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == link:
            return int(numbers.split()[8])
    raise RuntimeError(f"no interface {link}")


def measure(comm: Communicator, job: Job, host: int, leads: bool) -> list[Found]:
    found = []
    for num_bytes in job.num_bytes:
        known = calls(comm, num_bytes)
        for operation in job.operations:
            samples = {engine: [] for engine in job.engines}
            for engine in job.engines:
                known[engine, operation]()
            for _ in range(job.turns):
                for engine in job.engines:
                    samples[engine].append(
                        _turn(known[engine, operation], num_bytes, host, leads, job)
                    )
            for engine, turns in samples.items():
                cpu = statistics.median(turn[1] for turn in turns)
                sent = [
                    statistics.median(of) for of in zip(*(turn[2] for turn in turns), strict=True)
                ]
                seconds = [turn[0] for turn in turns]
                found.append(Found(operation, num_bytes, engine, seconds, cpu, sent))
    return found


def _turn(
    call: Callable[[], object], num_bytes: int, host: int, leads: bool, job: Job
) -> tuple[float, float, list[float]]:
    """Seconds, CPU seconds of all ranks and each host's sent bytes, of one call of a block."""
    repeats = calls_for(num_bytes / 1e9 + 1e-4)
    dist.barrier()
    sent, cpu, start = sent_bytes(), time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    dist.barrier()
    seconds, cpu, sent = time.perf_counter() - start, time.process_time() - cpu, sent_bytes() - sent
    told = torch.zeros(1 + len(job.ranks), dtype=torch.float64)
    told[0] = cpu
    if leads:
        told[1 + host] = sent
    dist.all_reduce(told)
    told /= repeats
    return seconds / repeats, told[0].item(), told[1:].tolist()


def run_rank(job: Job, host: int, local: int) -> None:
    torch.set_num_threads(1)
    rank = sum(job.ranks[:host]) + local
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    limit = timedelta(seconds=120)
    size = sum(job.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    comm = connect(dist.group.WORLD, "bench")
    check(comm)
    found = measure(comm, job, host, leads=local == 0)
    comm.close()
    dist.barrier()
    if rank == 0:
        Path(job.result).write_text(json.dumps([asdict(one) for one in found]))


def main() -> int:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    host = int(os.environ["RANK"])
    children = []
    for local in range(job.ranks[host]):
        child = os.fork()
        if child == 0:
            try:
                run_rank(job, host, local)
            except BaseException as error:
                print(f"host {host}, local rank {local}: {error!r}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    raise SystemExit(main())
