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

import socket
import threading
import time
import weakref
from collections.abc import Callable

import torch.distributed as dist

from pyparallel.comm.host_links import LOST_AFTER_S, Links
from pyparallel.comm.job_hosts import Host, meet_hosts
from pyparallel.comm.lost_hosts import forget_lost, tell_lost
from pyparallel.comm.tcp_connections import Connection, hang_up, tcp_connections

# How long a word needs to the ranks of a busy host.
HEARD_S = 0.5

_watched: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
_heartbeats: list[Heartbeat] = []


def watch_hosts(world: dist.ProcessGroup, end_waits: Callable[[], None]) -> None:
    """Have the hosts of torch's world watch each other from now on; a call of all its ranks.

    Args:
        end_waits: called when one is lost: ends the waits that are on no connection.
    """
    if world in _watched:
        return
    # What is lost to an older world must not be told in this one.
    close_heartbeats()
    _watched.add(world)
    forget_lost()
    hosts, own, listener = meet_hosts(world)
    if not any(host.addresses for host in hosts):
        # One machine, or containers of one that share its network: none is lost without the others.
        return
    heartbeat = Heartbeat(hosts, own, listener, end_waits)
    _heartbeats.append(heartbeat)
    heartbeat.start()


def note_connections() -> None:
    """Take this process's connections to the job's hosts for the job's own: a group has connected."""
    for heartbeat in _heartbeats:
        heartbeat.note_connections()


def close_heartbeats() -> None:
    """Watch no more: threads have ended and connections are closed when this returns."""
    _watched.clear()
    while _heartbeats:
        _heartbeats.pop().close()


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
        self._hosts, self._own, self._end_waits = hosts, own, end_waits
        self._first = listener is not None
        self._links = Links(hosts, own, listener)
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
        # The hosts before it connect to this one.
        to = range(self._own + 1, len(self._hosts)) if self._first else [self._own]
        for host in to:
            self._links.connect(host)
        while not self._links.ended:
            for lost in self._links.hear():
                self._lose(lost)

    def close(self) -> None:
        """End the thread and close its connections; in a fork of the process, its copies of them."""
        if self.is_alive():
            self._links.end()
            self.join()
        self._links.close()

    def _lose(self, host: int) -> None:
        if host in self._lost or host == self._own:
            return
        self._lost.add(host)
        lost = self._hosts[host]
        tell_lost(f"{lost} is lost: it has not answered for {LOST_AFTER_S} s", lost.ranks)
        self._links.tell(host)
        # What this rank hangs up on ends the waits of others, who should know why by then.
        time.sleep(HEARD_S)
        self._end_waits()
        own = self._links.inodes()

        def of_the_job(connection: Connection) -> bool:
            to_lost = connection.remote_address in lost.addresses
            return connection.inode not in own and (to_lost or connection.inode in self._noted)

        hang_up(of_the_job)


def _store_port() -> int | None:
    """Of torch's store, which roll calls go through after a loss."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return getattr(store, "port", None)
