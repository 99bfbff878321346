"""The heartbeat's listener and links, on the loopback interface: strangers, silence, no waiting."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from pyparallel.comm import heartbeat, host_links
from pyparallel.comm.group_of import close_groups
from pyparallel.comm.heartbeat import Heartbeat
from pyparallel.comm.job_hosts import TOKEN_BYTES, Host
from tests.machines.waiting import wait_for

TOKEN = bytes(range(TOKEN_BYTES))
Listening = tuple[Heartbeat, socket.socket, list[int]]


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    """The heartbeat of the last of three hosts, its listener, and the losses that it hears of."""
    lost: list[int] = []
    monkeypatch.setattr(heartbeat, "_store_port", lambda: None)
    monkeypatch.setattr(Heartbeat, "_lose", lambda self, host: lost.append(host))
    monkeypatch.setattr(host_links, "PROVE_S", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))
    hosts = [Host(f"h{n}", (n,), ("127.0.0.1",), 0, b"") for n in range(2)]
    hosts.append(Host("h2", (2,), ("127.0.0.1",), listener.getsockname()[1], TOKEN))
    thread = Heartbeat(hosts, 2, listener, lambda: None)
    thread.start()
    yield thread, listener, lost
    if listener.fileno() >= 0:
        thread.close()


def connected(listening: Listening, said: bytes = b"") -> socket.socket:
    end = socket.create_connection(listening[1].getsockname(), 5)
    end.sendall(said)
    return end


def hello(host: int) -> bytes:
    return TOKEN + host.to_bytes(4, "big")


def is_hung_up(end: socket.socket) -> bool:
    end.settimeout(5)
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def test_strangers_do_not_end_the_heartbeat(listening: Listening) -> None:
    connected(listening).close()
    connected(listening, b"short").close()
    for said in (bytes(TOKEN_BYTES + 4), hello(3)):
        with connected(listening, said) as end:
            assert is_hung_up(end)
    with connected(listening, hello(0) + (1).to_bytes(4, "big")):
        wait_for(lambda: listening[2] == [1], 5)
    assert listening[0].is_alive()


def test_a_silent_stranger_keeps_nobody_waiting_and_is_hung_up_on(listening: Listening) -> None:
    slow = [connected(listening, b"s") for _ in range(5)]
    began = time.monotonic()
    with connected(listening, hello(0) + (1).to_bytes(4, "big")):
        wait_for(lambda: listening[2] == [1], 5)
    # One of them may take a second.
    assert time.monotonic() - began < 0.9
    assert all(is_hung_up(end) for end in slow)
    assert time.monotonic() - began < 3


def test_more_strangers_than_are_held_open_only_delay(listening: Listening) -> None:
    silent = [connected(listening) for _ in range(70)]
    with connected(listening, hello(1) + (0).to_bytes(4, "big")):
        wait_for(lambda: listening[2] == [0], 10)
    assert listening[0].is_alive()
    for end in silent:
        end.close()


@pytest.mark.filterwarnings("error")
def test_a_host_that_refuses_is_told_of_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "_store_port", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    hosts = [Host(f"h{n}", (n,), ("127.0.0.1",), port, TOKEN) for n in range(2)]
    thread = Heartbeat(hosts, 0, socket.create_server(("127.0.0.1", 0)), lambda: None)
    thread.start()
    told = []

    def is_told() -> bool:
        told.append(capfd.readouterr().err)
        return "host h1 at 127.0.0.1 (rank 1) can't be watched" in "".join(told)

    wait_for(is_told, 5)
    assert thread.is_alive()
    thread.close()


def test_hosts_that_do_not_answer_are_connected_to_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full queue answers nobody; the third host's connection comes all the same."""
    monkeypatch.setattr(heartbeat, "_store_port", lambda: None)
    with socket.socket() as full, socket.create_server(("127.0.0.1", 0)) as there:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filling = [socket.socket() for _ in range(3)]
        for end in filling:
            end.setblocking(False)
            end.connect_ex(full.getsockname())
        ports = [0, full.getsockname()[1], full.getsockname()[1], there.getsockname()[1]]
        hosts = [Host(f"h{n}", (n,), ("127.0.0.1",), port, TOKEN) for n, port in enumerate(ports)]
        thread = Heartbeat(hosts, 0, socket.create_server(("127.0.0.1", 0)), lambda: None)
        thread.start()
        there.settimeout(3)
        end, _ = there.accept()
        end.settimeout(3)
        assert end.recv(100) == hello(0)
        end.close()
        thread.close()
        for end in filling:
            end.close()


def test_close_groups_ends_the_thread_and_its_connections(listening: Listening) -> None:
    thread, listener, _ = listening
    heartbeat._heartbeats.append(thread)
    at = listener.getsockname()
    with connected(listening, hello(0)) as proven, connected(listening) as stranger:
        close_groups()
        assert not thread.is_alive()
        assert not heartbeat._heartbeats
        assert is_hung_up(proven) and is_hung_up(stranger)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(at, 5)


def test_another_world_ends_the_older_ones_heartbeat(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat._heartbeats.append(listening[0])
    monkeypatch.setattr(heartbeat, "meet_hosts", lambda world: ([], 0, None))
    heartbeat.watch_hosts(FakeWorld(), lambda: None)
    assert not listening[0].is_alive()
    # What was given back is gone when another world's thread would use the number.
    assert listening[1].fileno() == -1


def test_a_fork_closes_its_copies_alone(listening: Listening) -> None:
    heartbeat._heartbeats.append(listening[0])
    child = os.fork()
    if child == 0:
        close_groups()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with connected(listening, hello(0) + (1).to_bytes(4, "big")):
        wait_for(lambda: listening[2] == [1], 5)
    heartbeat._heartbeats.clear()


class FakeWorld:
    """What no heartbeat has watched."""
