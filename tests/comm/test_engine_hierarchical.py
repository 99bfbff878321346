"""Groups that span machines, played on one: the same bits as on a single machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pyparallel.comm.connect import connect
from pyparallel.comm.hierarchical import HierarchicalCommunicator
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.launch import launch
from tests.comm.engine_checks import check_movement, check_reductions


def rounds(machines: str) -> str:
    comm = connect(dist.group.WORLD, "spanning", machine=machines[dist.get_rank()])
    for length in (0, 1, 5, 1000, 70_001):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            check_reductions(comm, dtype, length)
            check_movement(comm, dtype, length)
        comm.barrier()
    works = [comm.all_reduce(torch.ones(10), async_op=True) for _ in range(3)]
    for work in works:
        work.wait()
    comm.close()
    return type(comm).__name__


@pytest.mark.parametrize("machines", ["aabb", "abb", "aab", "aabcc"])
def test_machines_of_consecutive_ranks(machines: str) -> None:
    names = launch(rounds, len(machines), machines)
    assert set(names) == {HierarchicalCommunicator.__name__}


@pytest.mark.parametrize(
    ("machines", "engine"),
    [("aaa", SharedMemoryCommunicator), ("ab", TorchCommunicator), ("abab", TorchCommunicator)],
)
def test_the_engine_follows_from_the_machines(machines: str, engine: type) -> None:
    assert set(launch(chosen, len(machines), machines)) == {engine.__name__}


def chosen(machines: str) -> str:
    comm = connect(dist.group.WORLD, "chosen", machine=machines[dist.get_rank()])
    x = torch.full((5,), float(comm.rank))
    comm.all_reduce(x)
    assert x.tolist() == [sum(range(comm.size))] * 5
    comm.close()
    return type(comm).__name__


def created(machine_of_rank: str) -> str:
    import pyparallel.comm.rendezvous as rendezvous

    identity = rendezvous.machine_identity()
    rendezvous.machine_identity = lambda: identity + machine_of_rank[dist.get_rank()]
    with pytest.raises(ValueError, match="2 machines") as caught:
        SharedMemoryCommunicator.create(dist.group.WORLD, "one machine only")
    return str(caught.value)


def test_shared_memory_alone_refuses_several_machines() -> None:
    assert "connect" in launch(created, 2, "ab")[0]
