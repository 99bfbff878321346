"""Groups that span machines, played on one: the same bits as on a single machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from pyparallel.comm import hierarchical
from pyparallel.comm.connect import connect
from pyparallel.comm.group import Group
from pyparallel.comm.hierarchical import HierarchicalCommunicator
from pyparallel.comm.raw import all_reduce_raw
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.spanning import machines
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.launch import launch
from pyparallel.testing import poisoned_empty
from tests.comm.engine_checks import check_movement, check_reductions

ALL_REDUCIBLE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
)


def rounds(machine_of_rank: str) -> str:
    comm = connect(dist.group.WORLD, "spanning", machine=machine_of_rank[dist.get_rank()])
    for length in (0, 1, 5, 1000, 70_001):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            check_reductions(comm, dtype, length)
            check_movement(comm, dtype, length)
        comm.barrier()
    works = [comm.all_reduce(torch.ones(10), async_op=True) for _ in range(3)]
    for work in works:
        work.wait()
    # Memory of a call in inference mode serves those that come after it, of other sizes too.
    with torch.inference_mode():
        comm.all_reduce(torch.ones(70_001))
    comm.all_reduce(torch.ones(90_001))
    # Several slices, in the sizes that are used.
    check_reductions(comm, torch.bfloat16, hierarchical.LONGEST_SLICE // 2 + 1001)
    comm.close()
    if len(machine_of_rank) in (4, 6, 7):
        in_many_slices(machine_of_rank)
    return type(comm).__name__


def sent_bytes(call: Callable[[], None]) -> int:
    """What this rank sends to other machines meanwhile."""
    sent, send = [], dist.ProcessGroup.send

    def counting(group: dist.ProcessGroup, tensors: list[torch.Tensor], *rest: int) -> dist.Work:
        sent.append(tensors[0].nbytes)
        return send(group, tensors, *rest)

    dist.ProcessGroup.send = counting
    call()
    dist.ProcessGroup.send = send
    return sum(sent)


def counted(machine_of_rank: str, length: int) -> list[int]:
    comm = connect(dist.group.WORLD, "counted", machine=machine_of_rank[dist.get_rank()])
    x, part = torch.ones(length), torch.ones(length // comm.size)
    calls = (
        lambda: comm.all_reduce(x),
        lambda: comm.reduce_scatter(part, x),
        lambda: comm.all_gather(x, part),
        lambda: comm.broadcast(x, 0),
    )
    sent = [sent_bytes(call) for call in calls]
    comm.close()
    return sent


def test_no_machine_sends_more_than_its_share() -> None:
    """The table of docs/collectives.md, for three machines of 2, 1 and 3 ranks."""
    length = 3_000_000
    by_rank = launch(counted, 6, "aabccc", length)
    rows = [by_rank[:2], by_rank[2:3], by_rank[3:]]
    by_machine = [[sum(column) for column in zip(*ranks, strict=True)] for ranks in rows]
    num_bytes = 4 * length
    # Of nine slices every other one goes from the last machine to the first one first, which passes it
    # on; so it is with the second. The last machine gives away what is not for its ranks, half of the
    # parts; of an all-gather each machine sends its part twice.
    exact = [[3 / 2, 1, 2 / 3, 1], [3 / 2, 1, 1 / 3, 1 / 2], [1, 1 / 2, 1, 1 / 2]]
    for machine, (sent, shares) in enumerate(zip(by_machine, exact, strict=True)):
        for call, (got, share) in enumerate(zip(sent, shares, strict=True)):
            # An odd number of slices is not halved.
            slack = num_bytes / 9 if call in (0, 3) else 64
            assert abs(got - share * num_bytes) <= slack, (machine, call, got / num_bytes)


def in_many_slices(machine_of_rank: str) -> None:
    """More slices than stages, lanes and slices of one element, nothing that is short."""
    hierarchical.SHORTEST_SLICE = hierarchical.LONGEST_SLICE = 8192
    hierarchical.SHORT_BYTES = 0
    machines.GRAIN_BYTES = 1024
    comm = connect(dist.group.WORLD, "sliced", machine=machine_of_rank[dist.get_rank()])
    with poisoned_empty():
        for length in (0, 1, 2049, 20_011):
            for dtype in ALL_REDUCIBLE:
                check_reductions(comm, dtype, length)
            for dtype in (torch.float32, torch.bool, torch.complex128):
                check_movement(comm, dtype, length)
        # Everything belongs to one rank; and what a call leaves does not reach the next.
        for owner in range(comm.size):
            counts = [4099 * (rank == owner) for rank in range(comm.size)]
            own = torch.empty(counts[comm.rank])
            comm.reduce_scatter(own, torch.ones(4099), counts=counts)
            gathered = torch.empty(4099)
            comm.all_gather(gathered, own, counts=counts)
            assert (gathered == comm.size).all()
        transposed = torch.arange(6000.0).view(60, 100).t()
        assert torch.equal(all_reduce_raw(transposed, Group.over(comm)), transposed * comm.size)
    comm.close()


WIDER = [pytest.param(machines, marks=pytest.mark.slow) for machines in ("abbb", "abcc", "aabcdef")]


@pytest.mark.parametrize("machines", ["aabb", "abb", "aab", "aabcc", "aabccc", *WIDER])
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
