"""A heartbeat between hosts: one that has lost power or network is named within ten seconds.

The first ranks of every two hosts keep one idle TCP connection, and the kernel's keepalive asks on it
once a second whether the other host is there. So it is the kernel that answers: a rank that computes at
full load, holds the interpreter's lock, or is stopped by a signal or a debugger raises no alarm, and no
collective pays for it. Eight seconds without an answer mean that the host is lost: where a link drops
5 % of its packets each way, seven questions or their answers get lost in a row once in 140 days
(1 / 0.0975^7 s). A host whose kernel lives is not lost, whatever its processes do; those are for the
timeouts of what waits for them.

Whoever finds a host lost tells the other hosts, and the ranks of its own, which have a connection to the
first one there. Each rank then says so in every PeerError (:mod:`pyparallel.comm.lost_hosts`) and ends
what waits: the shared memories' waits, and the connections of the job, on which Gloo waits.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import secrets
import select
import socket
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.lost_hosts import forget_lost, tell_lost
from pyparallel.comm.rendezvous import HELLO_S, machines_of
from pyparallel.comm.tcp_connections import Connection, hang_up, tcp_connections

# Without an answer for so long a host is lost; it is asked every second.
LOST_AFTER_S = 8
CONNECT_S = 5.0
# A host's place among the hosts, as it is told.
INDEX_BYTES = 4
TOKEN_BYTES = 16
# Of a connection whose other end has gone in an orderly way, or at once: a process ended, not its host.
ENDED = (errno.ECONNRESET, errno.EPIPE)

_watched: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
_heartbeats: list[Heartbeat] = []


@dataclass(frozen=True)
class Host:
    """One host of a job.

    Attributes:
        name: its own name for itself.
        ranks: of torch's world, the first of which speaks for it.
        addresses: through which it is connected.
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


def watch_hosts(world: dist.ProcessGroup, end_waits: Callable[[], None]) -> None:
    """Have the hosts of torch's world watch each other from now on; a call of all its ranks.

    Args:
        end_waits: called when one is lost: ends the waits that are on no connection.
    """
    if world in _watched:
        return
    _watched.add(world)
    forget_lost()
    machines, rank = machines_of(world), world.rank()
    if len(machines) == 1:
        return
    own = next(number for number, ranks in enumerate(machines) if rank in ranks)
    addresses, token = _addresses(), secrets.token_bytes(TOKEN_BYTES)
    listener = _listen(addresses) if rank == machines[own][0] else None
    port = 0 if listener is None else listener.getsockname()[1]
    told = gather_objects(world, [socket.gethostname(), addresses, port, token.hex()])
    hosts = []
    for ranks in machines:
        name, of_host, at, secret = told[ranks[0]]
        hosts.append(Host(name, ranks, tuple(of_host), at, bytes.fromhex(secret)))
    if not any(host.addresses for host in hosts):
        # Containers of one machine that share its network: none is lost without the others.
        return
    heartbeat = Heartbeat(hosts, own, listener, end_waits)
    _heartbeats.append(heartbeat)
    heartbeat.start()


def note_connections() -> None:
    """Take this process's connections to the job's hosts for the job's own: a group has connected."""
    for heartbeat in _heartbeats:
        heartbeat.note_connections()


class Heartbeat(threading.Thread):
    """A rank's thread: it sleeps until the kernel, or another rank, has something to tell."""

    def __init__(
        self,
        hosts: list[Host],
        own: int,
        listener: socket.socket | None,
        end_waits: Callable[[], None],
    ) -> None:
        super().__init__(name="pyparallel-heartbeat", daemon=True)
        self._hosts, self._own, self._listener = hosts, own, listener
        self._end_waits = end_waits
        # By descriptor: the connection, and the host at the other end where it is another.
        self._ends: dict[int, tuple[socket.socket, int | None]] = {}
        self._poll = select.poll()
        self._lost: set[int] = set()
        self._addresses = {address for host in hosts for address in host.addresses}
        self._noted: set[int] = set()
        self.note_connections()

    def note_connections(self) -> None:
        store = _store_port()
        for connection in tcp_connections():
            of_store = store in (connection.port, connection.remote_port)
            if connection.remote_address in self._addresses and not of_store:
                self._noted.add(connection.inode)

    def run(self) -> None:
        if self._listener is None:
            self._connect(self._own, watched=None)
        else:
            self._add(self._listener, None)
            # The others connect to this one.
            for host in range(self._own + 1, len(self._hosts)):
                self._connect(host, watched=host)
        while self._ends:
            for descriptor, _ in self._poll.poll():
                if self._listener is not None and descriptor == self._listener.fileno():
                    self._admit(self._listener)
                elif descriptor in self._ends:
                    self._hear(descriptor)

    def _connect(self, host: int, *, watched: int | None) -> None:
        to = self._hosts[host]
        try:
            if not to.port:
                raise OSError("it has no address that another host could reach")
            end = socket.create_connection((to.addresses[0], to.port), CONNECT_S)
            end.sendall(to.token + self._own.to_bytes(INDEX_BYTES, "big"))
        except OSError as error:
            warnings.warn(
                f"{to} can't be watched ({error}): its loss is told at the timeout of what waits for "
                f"it; let the job's hosts connect to each other's ports",
                stacklevel=1,
            )
            return
        self._add(end, watched)

    def _admit(self, listener: socket.socket) -> None:
        """Take a connection that knows the token; whoever else connects is hung up on."""
        with suppress(OSError):
            end, _ = listener.accept()
            end.settimeout(HELLO_S)
            said = _read(end, TOKEN_BYTES + INDEX_BYTES)
            host = int.from_bytes(said[TOKEN_BYTES:], "big")
            knows = hmac.compare_digest(said[:TOKEN_BYTES], self._hosts[self._own].token)
            if knows and host < len(self._hosts):
                self._add(end, None if host == self._own else host)
            else:
                end.close()

    def _add(self, end: socket.socket, host: int | None) -> None:
        if host is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LOST_AFTER_S)
            # Bounds what was sent and not answered, too.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000)
        self._ends[end.fileno()] = (end, host)
        self._poll.register(end, select.POLLIN)

    def _hear(self, descriptor: int) -> None:
        end, host = self._ends[descriptor]
        lost = None
        try:
            told = _read(end, INDEX_BYTES)
            lost = int.from_bytes(told, "big")
        except EOFError:
            self._forget(descriptor)
        except OSError as error:
            self._forget(descriptor)
            lost = host if error.errno not in ENDED else None
        if lost is not None and lost < len(self._hosts):
            self._lose(lost)

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._ends.pop(descriptor)[0].close()

    def _lose(self, host: int) -> None:
        if host in self._lost or host == self._own:
            return
        self._lost.add(host)
        lost = self._hosts[host]
        tell_lost(f"{lost} is lost: it has not answered for {LOST_AFTER_S} s", lost.ranks)
        for end, _ in self._ends.values():
            if end is not self._listener:
                with suppress(OSError):
                    end.send(host.to_bytes(INDEX_BYTES, "big"), socket.MSG_DONTWAIT)
        self._end_waits()
        own = {os.fstat(descriptor).st_ino for descriptor in self._ends}

        def of_the_job(connection: Connection) -> bool:
            to_lost = connection.remote_address in lost.addresses
            return connection.inode not in own and (to_lost or connection.inode in self._noted)

        hang_up(of_the_job)


def _read(end: socket.socket, length: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: the other end has closed before.
    """
    data = b""
    while len(data) < length:
        more = end.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _addresses() -> list[str]:
    """Through which this process is connected to other hosts, the most used first."""
    count = Counter(
        connection.address
        for connection in tcp_connections()
        if connection.address != connection.remote_address
        and not ipaddress.ip_address(connection.address).is_loopback
    )
    return [address for address, _ in count.most_common()]


def _listen(addresses: list[str]) -> socket.socket | None:
    if not addresses:
        return None
    family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
    with suppress(OSError):
        return socket.create_server((addresses[0], 0), family=family, backlog=socket.SOMAXCONN)
    return None


def _store_port() -> int | None:
    """Of torch's store, which roll calls go through after a loss."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return getattr(store, "port", None)
