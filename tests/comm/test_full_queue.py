"""Strangers that fill the queue of a rank's socket keep no rank from its group."""

from __future__ import annotations

import re
import socket

import pytest
import torch
import torch.distributed as dist

from pyparallel.comm import rendezvous
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.connect import connect
from pyparallel.launch import launch

listen = rendezvous.listen


def fill(listener: socket.socket, address: str, size: int) -> None:
    """Listen, and have strangers come first: here they are connections of rank 0's own process."""
    listen(listener, address, size)
    if dist.get_rank() == 0:
        listener.listen(1)
        for _ in range(10):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.setblocking(False)
            stranger.connect_ex("\0" + address)
            strangers.append(stranger)


strangers: list[socket.socket] = []


def meets() -> list:
    rendezvous.listen = fill
    comm = connect(dist.group.WORLD, "meets")
    x = torch.ones(3)
    comm.all_reduce(x)
    told = [type(comm).__name__, x.tolist()]
    comm.close()
    # Nobody makes room from now on: every rank is told the same, at the timeout.
    rendezvous.let_in = lambda listener, expected, came: None
    with pytest.raises(PeerError) as caught:
        rendezvous.meet(dist.group.WORLD, "full", timeout_s=0.3)
    return [*told, str(caught.value)]


def test_a_queue_that_strangers_fill_is_emptied_and_the_join_goes_on() -> None:
    told = launch(meets, 3, timeout_s=20)
    assert [engine for engine, _, _ in told] == ["SharedMemoryCommunicator"] * 3
    assert [x for _, x, _ in told] == [[3.0] * 3] * 3
    assert len({error for _, _, error in told}) == 1
    # Whose time is over first is told of.
    assert re.search(
        r"could not find its shared memory: rank [12]: \w+: strangers fill the queue of rank 0's",
        told[0][2],
    )
