"""The TCP connections of this process: whom they lead to, and how to hang up.

Gloo's waits can't be ended from outside by torch (its ``abort`` leaves them waiting, seen with torch
2.13), but whoever waits on a connection hears when it is shut down.

Descriptors are asked through libc, since Python's ``socket.socket(fileno=...)`` makes what it is given
non-blocking where the program has set a default timeout, and so the owner's socket too.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

# Of the kernel's longest address, struct sockaddr_storage.
ADDRESS_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)


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
    for connection, descriptor in _connections():
        if which(connection):
            _libc.shutdown(descriptor, socket.SHUT_RDWR)


def _connections() -> Iterator[tuple[Connection, int]]:
    """Each with a descriptor of it that is closed afterwards."""
    for name in os.listdir("/proc/self/fd"):
        # Closed meanwhile, no socket, not connected: none of ours.
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            # A descriptor of its own, since its owner may close it at any time.
            descriptor = os.dup(int(name))
            try:
                here = _address(_libc.getsockname, descriptor)
                there = _address(_libc.getpeername, descriptor)
                if here is not None and there is not None:
                    yield Connection(os.fstat(descriptor).st_ino, *here, *there), descriptor
            finally:
                os.close(descriptor)


def _address(ask: Callable[..., int], descriptor: int) -> tuple[str, int] | None:
    """Address and port, by ``getsockname`` or ``getpeername``; None for what is not of IP.

    Raises:
        OSError: it has none.
    """
    told = ctypes.create_string_buffer(ADDRESS_BYTES)
    length = ctypes.c_uint32(ADDRESS_BYTES)
    if ask(descriptor, told, ctypes.byref(length)) != 0:
        raise OSError(ctypes.get_errno(), "it has no address")
    family, port = struct.unpack_from("=H", told)[0], struct.unpack_from("!H", told, 2)[0]
    # struct sockaddr_in and sockaddr_in6: family, port; address or flow, then address.
    if family == socket.AF_INET:
        return socket.inet_ntop(family, told[4:8]), port
    if family == socket.AF_INET6:
        # IPv4 as such, where a socket of IPv6 speaks it.
        return socket.inet_ntop(family, told[8:24]).removeprefix("::ffff:"), port
    return None
