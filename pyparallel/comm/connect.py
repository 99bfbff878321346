"""Which engine a group of CPU ranks talks through: the best one that reaches all its ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.hierarchical import HierarchicalCommunicator
from pyparallel.comm.rendezvous import meet
from pyparallel.comm.shared.engine import JOIN_TIMEOUT_S, SharedMemoryCommunicator
from pyparallel.comm.torch_engine import TorchCommunicator


def connect(
    process_group: dist.ProcessGroup,
    name: str,
    *,
    timeout_s: float | None = None,
    machine: str | None = None,
) -> Communicator:
    """The communicator of ``process_group`` for CPU tensors; a call of all its ranks.

    All ranks on one machine: shared memory. Several machines, each with consecutive ranks and one
    with more than one of them: shared memory inside and torch.distributed between. Otherwise there
    is nothing to share, and torch.distributed does it all.

    Args:
        timeout_s: how long a call may wait for a peer; by default as long as torch.distributed's.
        machine: a name for this machine; tests play several machines on one.

    Raises:
        PeerError: the ranks of a machine could not reach one another; names rank and reason.
    """
    if timeout_s is None:
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        timeout_s = backend.options._timeout.total_seconds()
    meeting = meet(process_group, name, timeout_s=min(timeout_s, JOIN_TIMEOUT_S), machine=machine)
    machines = meeting.machines
    rank, local = process_group.rank(), machines[meeting.machine]
    in_order = [rank for ranks in machines for rank in ranks] == list(range(process_group.size()))
    if len(machines) > 1 and (not in_order or all(len(ranks) == 1 for ranks in machines)):
        for descriptor in (meeting.memory, *meeting.processes):
            if descriptor >= 0:
                os.close(descriptor)
        return TorchCommunicator(process_group, name)
    inside = SharedMemoryCommunicator(
        name if len(machines) == 1 else f"{name}, machine {meeting.machine}",
        local.index(rank),
        len(local),
        meeting.memory,
        meeting.processes,
        timeout_s=timeout_s,
    )
    if len(machines) == 1:
        return inside
    return HierarchicalCommunicator(
        TorchCommunicator(process_group, name), inside, machines, meeting.machine
    )
