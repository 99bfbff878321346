"""Where a host's first rank listens: at the address through which the job's ranks are connected."""

from __future__ import annotations

import pytest

from pyparallel.comm import job_hosts
from pyparallel.comm.tcp_connections import Connection


class World:
    """Torch's world, as rank 0 of 2 sees it."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_a_programs_own_connections_do_not_choose_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three to a database through another interface, one to the job's other rank.
    own = [Connection(n, "192.168.7.1", 4000 + n, "192.168.7.9", 5432) for n in range(3)]
    connections = [*own, Connection(3, "127.0.0.2", 5000, "10.0.0.2", 6000)]
    monkeypatch.setattr(job_hosts, "tcp_connections", lambda: connections)
    monkeypatch.setattr(job_hosts, "machines_of", lambda world: ((0,), (1,)))
    # The address of the job's interface has to be one of this machine, to listen at.
    monkeypatch.setattr(job_hosts.ipaddress.IPv4Address, "is_loopback", False)
    told = {list: ["10.0.0.2", "192.168.7.2"], str: ["b", ["10.0.0.2"], 5, "00"]}

    def gather(world: World, value: list) -> list:
        later = len(value) == 4 and isinstance(value[1], list)
        return [value, told[str] if later else told[list]]

    monkeypatch.setattr(job_hosts, "gather_objects", gather)
    hosts, index, listener = job_hosts.meet_hosts(World())
    assert listener is not None
    with listener:
        assert (hosts[0].addresses, index) == (("127.0.0.2",), 0)
        assert listener.getsockname() == ("127.0.0.2", hosts[0].port)
    assert hosts[1].addresses == ("10.0.0.2",) and hosts[1].port == 5
