"""The TCP connections of this process: whom they lead to, and how to hang up.

Gloo's waits can't be ended from outside by torch (its ``abort`` leaves them waiting, seen with torch
2.13), but whoever waits on a connection hears when it is shut down.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Connection:
    """One end of a TCP connection; ``inode`` is the kernel's number of it, never two at a time."""

    inode: int
    address: str
    port: int
    remote_address: str
    remote_port: int


def tcp_connections() -> list[Connection]:
    """All that are established."""
    return [connection for connection, _ in _connections()]


def hang_up(which: Callable[[Connection], bool]) -> None:
    """Shut down those that ``which`` holds for; whoever waits on them is told that they have ended."""
    for connection, end in _connections():
        if which(connection):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _connections() -> Iterator[tuple[Connection, socket.socket]]:
    for name in os.listdir("/proc/self/fd"):
        # Closed meanwhile, no socket, not connected: none of ours.
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            # A descriptor of its own, since its owner may close it at any time.
            with closing(socket.socket(fileno=os.dup(int(name)))) as end:
                if end.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                here, there = end.getsockname(), end.getpeername()
                inode = os.fstat(end.fileno()).st_ino
                yield Connection(inode, _plain(here[0]), here[1], _plain(there[0]), there[1]), end


def _plain(address: str) -> str:
    """IPv4 as such, where a socket of IPv6 speaks it."""
    return address.removeprefix("::ffff:").partition("%")[0]
