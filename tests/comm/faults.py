"""Ranks that may die: what each came to, without ending the others as launch() does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from pyparallel.comm.communicator import Communicator, PeerError
from pyparallel.comm.connect import connect
from pyparallel.comm.shared.engine import SharedMemoryCommunicator

LENGTH = 3000


def one_call(comm: Communicator, operation: str, length: int = LENGTH) -> None:
    """One call of that kind, on every rank."""
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
    elif operation == "send":
        # A sender waits for nobody, but must not pile up what nobody will take.
        if comm.rank == 1:
            comm.recv(x, 0)
        elif comm.rank == 0:
            comm.send(x, 1)
        else:
            comm.recv(x, 1)
    elif operation == "message":
        # Round the ring; a short message waits for nobody, so nobody waits for himself.
        comm.send(x, (comm.rank + 1) % comm.size)
        comm.recv(x, (comm.rank - 1) % comm.size)
    else:
        comm.barrier()


@dataclass
class Report:
    """What a surviving rank saw: its PeerError, when, and what the group said to one more call."""

    message: str
    operation: str
    sequence: int
    group: str
    missing: tuple[int, ...]
    raised_at: float
    afterwards: str


def run_with_faults(
    body: Callable[..., None],
    size: int,
    *args: Any,
    timeout_s: float,
    wait_s: float = 60.0,
    machines: str | None = None,
) -> dict[int, Report | str]:
    """``body(communicator, *args)`` on each rank, which must end in a PeerError or not at all.

    ``machines`` names the machine of each rank, where they are not all on this one.

    Returns the report of each rank, "ended" if the body returned, or "lost" if the rank died; a rank
    that is stopped is lost after the others have reported. No process is left.
    """
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = {}
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(sender, body, args, rank, size, store.port, timeout_s, machines)
        )
        process.start()
        sender.close()
        ranks[rank] = (process, receiver)
    results: dict[int, Report | str] = {}
    deadline = time.monotonic() + wait_s
    try:
        for rank, (_, receiver) in ranks.items():
            stopped = [r for r, (p, _) in ranks.items() if _is_stopped(p.pid)]
            if rank in stopped:
                continue
            while not receiver.poll(0.05):
                if _is_stopped(ranks[rank][0].pid):
                    break
                if time.monotonic() > deadline:
                    raise AssertionError(f"rank {rank} neither ended nor raised in {wait_s} s")
            else:
                try:
                    results[rank] = receiver.recv()
                except EOFError:
                    results[rank] = "lost"
        return {rank: results.get(rank, "lost") for rank in ranks}
    finally:
        for process, receiver in ranks.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            receiver.close()


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _rank(
    sender: connection.Connection,
    body: Callable[..., None],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    port: int,
    timeout_s: float,
    machines: str | None,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    if machines is None:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        comm = SharedMemoryCommunicator.create(dist.group.WORLD, "victims", timeout_s=timeout_s)
    else:
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        comm = connect(dist.group.WORLD, "victims", timeout_s=timeout_s, machine=machines[rank])
    result: Report | str = "ended"
    try:
        body(comm, *args)
    except PeerError as error:
        raised_at = time.time()
        try:
            comm.barrier()
            afterwards = "accepted"
        except PeerError as again:
            afterwards = str(again)
        result = Report(
            str(error),
            error.operation,
            error.sequence,
            error.group,
            error.missing,
            raised_at,
            afterwards,
        )
    sender.send(result)
    # Gloo's threads may wait for the dead; nothing here is worth an orderly end.
    os._exit(0)
