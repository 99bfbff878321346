"""A process's own connections are found and hung up on, and what is only looked at stays as it is."""

from __future__ import annotations

import os
import socket

import pytest

from pyparallel.comm.tcp_connections import hang_up, tcp_connections


@pytest.mark.parametrize("at", ["127.0.0.1", "::1"])
def test_a_connection_is_found_and_hung_up_on(at: str) -> None:
    family = socket.AF_INET6 if ":" in at else socket.AF_INET
    with (
        socket.create_server((at, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as ours,
        listener.accept()[0] as theirs,
    ):
        inode = os.fstat(ours.fileno()).st_ino
        found = {connection.inode: connection for connection in tcp_connections()}
        one = found[inode]
        assert (one.address, one.port) == ours.getsockname()[:2]
        assert (one.remote_address, one.remote_port) == listener.getsockname()[:2]
        assert os.fstat(listener.fileno()).st_ino not in found
        hang_up(lambda connection: connection.inode == inode)
        theirs.settimeout(5)
        assert theirs.recv(1) == b""


def test_ipv4_over_ipv6_is_told_as_ipv4() -> None:
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])),
        listener.accept()[0] as theirs,
    ):
        inode = os.fstat(theirs.fileno()).st_ino
        (one,) = (c for c in tcp_connections() if c.inode == inode)
        assert one.address == one.remote_address == "127.0.0.1"


def test_a_default_timeout_changes_nobodys_socket() -> None:
    unix, other = socket.socketpair()
    with (
        unix,
        other,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as tcp,
    ):
        socket.setdefaulttimeout(30)
        try:
            assert tcp_connections()
        finally:
            socket.setdefaulttimeout(None)
        for end in (unix, other, listener, tcp):
            assert os.get_blocking(end.fileno())
