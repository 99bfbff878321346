"""The Unix socket through which a machine's ranks get their shared memory, and nobody else does."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping

# How long whoever connects may take to say which rank it is.
HELLO_S = 1.0


def listen(listener: socket.socket, address: str, size: int) -> None:
    listener.bind("\0" + address)
    # Strangers may stand in the queue too.
    listener.listen(max(size, socket.SOMAXCONN))


def take(connection: socket.socket) -> int:
    """The descriptor that the memory's maker sends."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if len(descriptors) != 1:
        raise RuntimeError("the memory's maker sent no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def let_in(listener: socket.socket, expected: set[int], came: list[socket.socket]) -> None:
    """Make room in the queue: who is expected is appended to ``came``, whoever else is hung up on."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(socket.SOMAXCONN):
            connection, _ = listener.accept()
            pid, user, _ = _credentials(connection)
            if user == os.geteuid() and pid in expected:
                came.append(connection)
            else:
                connection.close()


def hand_out(
    memory: int,
    peers: Mapping[int, int],
    listener: socket.socket,
    came: list[socket.socket],
    deadline: float,
) -> None:
    """Give ``memory`` to each other rank once; whoever else connects is hung up on.

    Args:
        peers: local ranks by their process ids.
        came: connections that :func:`let_in` has taken already.
        deadline: of ``time.monotonic()``.

    Raises:
        RuntimeError: some did not come.
    """
    missing = dict(peers)
    while missing:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection = came.pop() if came else listener.accept()[0]
        except TimeoutError:
            late = ", ".join(map(str, missing.values()))
            raise RuntimeError(f"local ranks {late} did not come for the memory") from None
        with connection:
            pid, user, _ = _credentials(connection)
            if user == os.geteuid() and pid in missing:
                connection.settimeout(HELLO_S)
                # A rank that died meanwhile is named by its process.
                with contextlib.suppress(OSError):
                    socket.send_fds(connection, [b"m"], [memory])
                del missing[pid]


def check_user(connection: socket.socket) -> None:
    _, user, _ = _credentials(connection)
    if user != os.geteuid():
        raise RuntimeError(f"a process of user {user} connected, expected user {os.geteuid()}")


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end, as the kernel has them."""
    pid, user, group = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return pid, user, group
