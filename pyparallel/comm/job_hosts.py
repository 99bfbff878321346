"""The hosts of a job: who is on each, and where its first rank listens to the others."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.rendezvous import machines_of
from pyparallel.comm.tcp_connections import Connection, tcp_connections

TOKEN_BYTES = 16


@dataclass(frozen=True)
class Host:
    """One host of a job.

    Attributes:
        name: its own name for itself.
        ranks: of torch's world, the first of which speaks for it.
        addresses: through which it is connected to the others, the most used first.
        port: at which its first rank listens on the first address; 0 where it could not.
        token: what a connection has to say.
    """

    name: str
    ranks: tuple[int, ...]
    addresses: tuple[str, ...]
    port: int
    token: bytes

    def __str__(self) -> str:
        where = f" at {self.addresses[0]}" if self.addresses else ""
        ranks = ", ".join(map(str, self.ranks[:16])) + (", ..." if len(self.ranks) > 16 else "")
        return f"host {self.name}{where} ({'rank' if len(self.ranks) == 1 else 'ranks'} {ranks})"


def meet_hosts(world: dist.ProcessGroup) -> tuple[list[Host], int, socket.socket | None]:
    """The hosts of torch's world, this rank's index, and its listener if it is its host's first.

    A call of all ranks of ``world``.
    """
    machines, rank = machines_of(world), world.rank()
    own = next(number for number, ranks in enumerate(machines) if rank in ranks)
    if len(machines) == 1:
        return [], own, None
    connections = _to_elsewhere()
    of_ranks = gather_objects(world, sorted({connection.address for connection in connections}))
    away = {
        address
        for peer in set(range(world.size())) - {*machines[own]}
        for address in of_ranks[peer]
    }
    # The program may have connections of its own, through interfaces that lead to no rank.
    count = Counter(c.address for c in connections if c.remote_address in away)
    addresses = [address for address, _ in count.most_common()]
    token = secrets.token_bytes(TOKEN_BYTES)
    listener = _listen(addresses) if rank == machines[own][0] else None
    port = 0 if listener is None else listener.getsockname()[1]
    told = gather_objects(world, [socket.gethostname(), addresses, port, token.hex()])
    hosts = []
    for ranks in machines:
        name, of_host, at, secret = told[ranks[0]]
        hosts.append(Host(name, ranks, tuple(of_host), at, bytes.fromhex(secret)))
    return hosts, own, listener


def _to_elsewhere() -> list[Connection]:
    """This process's connections that leave the host, as far as it can tell."""
    return [
        connection
        for connection in tcp_connections()
        if connection.address != connection.remote_address
        and not ipaddress.ip_address(connection.address).is_loopback
    ]


def _listen(addresses: list[str]) -> socket.socket | None:
    if not addresses:
        return None
    family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
    with suppress(OSError):
        return socket.create_server((addresses[0], 0), family=family, backlog=socket.SOMAXCONN)
    return None
