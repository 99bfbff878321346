"""A process of another user at every socket of ranks: connecting, reading keys, joining."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pyparallel.launch import RankError, launch
from pyparallel.mesh import init_mesh
from tests.campaigns.rows import Row

STRANGER = 65534


def campaign(seed: int, count: int) -> list[Row]:
    """``count`` launches while a stranger tries; without root it is another process of this user, whom
    only the abstract sockets turn away by its process."""
    rng = random.Random(seed)
    return [_one(rng.choice((2, 3)), rng.choice(("abstract", "loopback"))) for _ in range(count)]


def _one(size: int, sockets: str) -> Row:
    with stranger(sockets) as found:
        started = time.monotonic()
        verdict, detail = "ok", ""
        try:
            if launch(meet, size, threads=1, timeout_s=20.0) != ["met"] * size:
                verdict = "wrong"
        except RankError as error:
            # Who takes a rank's place on the loopback interface is found out, and nothing begins.
            detail = str(error).splitlines()[0]
            refused = "another program has taken the place" in detail or sockets == "loopback"
            verdict = "ok" if refused else "wrong"
        took = time.monotonic() - started
    seen = found()
    if seen["got"]:
        verdict, detail = "joined", seen["got"]
    detail = (
        f"{seen['tries']} tries of user {STRANGER if os.geteuid() == 0 else os.geteuid()}; {detail}"
    )
    return Row("strangers", "start-up", sockets, verdict, "", took, detail)


def meet() -> str:
    """What a rank does: meet the others three times over."""
    for _ in range(3):
        init_mesh(tp=dist.get_world_size()).world.communicator.barrier()
    return "met"


@contextmanager
def stranger(sockets: str) -> Iterator:
    """A process of another user that tries every socket it sees; the value tells what it got."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(reader)
            # torch's own words about every refusal.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _try(sockets, writer)
        os._exit(0)
    os.close(writer)
    told: dict[str, object] = {"tries": 0, "got": ""}
    try:
        yield lambda: told
    finally:
        os.kill(pid, signal.SIGTERM)
        with os.fdopen(reader) as lines:
            text = lines.read()
        os.waitpid(pid, 0)
        told["tries"] = text.count("t")
        told["got"] = "".join(letter for letter in text if letter in "dsk")


def _try(sockets: str, writer: int) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
    known = set(_abstract()) | set(map(str, _loopback()))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if sockets == "abstract":
            for name in set(_abstract()) - known:
                os.write(writer, b"t")
                _ask_for_memory(name, writer)
        else:
            for port in _loopback():
                if str(port) not in known:
                    known.add(str(port))
                    os.write(writer, b"t")
                    _ask_port(port, writer)


def _abstract() -> list[str]:
    text = Path("/proc/net/unix").read_text(errors="replace")
    return [line.split("@", 1)[1] for line in text.splitlines() if "@pyparallel" in line]


def _ask_for_memory(name: str, writer: int) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(0.2)
        connection.connect("\0" + name)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 4)
        if descriptors and os.geteuid() == STRANGER:
            os.write(writer, b"d")


def _loopback() -> list[int]:
    """Ports that somebody else listens on, on any interface."""
    ports = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[7]) != os.geteuid():
                ports.append(int(fields[1].split(":")[1], 16))
    return ports


def _ask_port(port: int, writer: int) -> None:
    """Connect as Gloo's peers do, with the next number, and read a torch store's keys."""
    with suppress(OSError), socket.socket() as connection:
        connection.settimeout(0.05)
        connection.connect(("127.0.0.1", port))
        connection.sendall(struct.pack("<q", 0))
        with suppress(TimeoutError):
            connection.recv(64)
    with suppress(RuntimeError):
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=False,
            timeout=timedelta(seconds=0.2),
            wait_for_workers=False,
        )
        store.set("stranger", "here")
        os.write(writer, b"k")
