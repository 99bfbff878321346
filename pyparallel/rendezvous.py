"""How the CPU ranks of a group come to share memory and to watch each other.

Rank 0 makes one anonymous memory and hands its descriptor to the others through a Unix socket in the
abstract namespace, which leaves no file behind; only processes of the same user get it. Every rank
opens a process descriptor (pidfd) of every other, so a death is seen at once and a reused process id
cannot be mistaken for a peer.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from pyparallel._C import create_shared_memory
from pyparallel.communicator import PeerError

MAX_RANKS = 64

T = TypeVar("T")


def machine_identity() -> str:
    """Equal for two processes exactly if they can share memory and watch each other this way."""
    namespaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join([boot, *map(str, namespaces)])


@dataclass(frozen=True)
class Presence:
    """What a rank tells the others about itself."""

    machine: str
    pid: int
    start_time: int
    address: str
    error: str | None


def gather_objects(process_group: dist.ProcessGroup, value: T) -> list[T]:
    """``value`` of every rank."""
    values: list[Any] = [None] * process_group.size()
    dist.all_gather_object(values, value, group=process_group)
    return values


def meet(process_group: dist.ProcessGroup, name: str, *, timeout_s: float) -> tuple[int, list[int]]:
    """Descriptors of the group's memory and of its processes (-1 for this one); a call of all ranks.

    Raises:
        ValueError: more than 64 ranks, or ranks on several machines.
        PeerError: a rank could not join; every rank raises it, with that rank and the reason.
    """
    size = process_group.size()
    if size > MAX_RANKS:
        raise ValueError(f"group '{name}': expected at most {MAX_RANKS} ranks, got {size}")
    opened: list[int] = []
    listener: socket.socket | None = None
    try:
        error, address = None, ""
        if process_group.rank() == 0:
            try:
                listener, address = _listen(size)
                opened.append(create_shared_memory(size))
            except OSError as problem:
                error = str(problem)
        pid = os.getpid()
        own = Presence(machine_identity(), pid, _start_time(pid), address, error)
        ranks = gather_objects(process_group, own)
        _require_none(name, "prepare", [presence.error for presence in ranks])
        if any(presence.machine != own.machine for presence in ranks):
            raise ValueError(
                f"group '{name}': its ranks are on several machines (or containers); use a "
                "HierarchicalCommunicator"
            )
        error = _attempt(lambda: _join(process_group.rank(), ranks, listener, opened, timeout_s))
        _require_none(name, "join", gather_objects(process_group, error))
    except BaseException:
        for descriptor in opened:
            if descriptor >= 0:
                os.close(descriptor)
        raise
    finally:
        if listener is not None:
            listener.close()
    return opened[0], opened[1:]


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
        return None
    except (OSError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"


def _require_none(name: str, action: str, errors: list[str | None]) -> None:
    failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if failed:
        reasons = "; ".join(f"rank {rank}: {error}" for rank, error in failed)
        raise PeerError(f"group '{name}' could not {action} its shared memory: {reasons}")


def _listen(size: int) -> tuple[socket.socket, str]:
    address = f"pyparallel-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + address)
    listener.listen(size)
    return listener, address


def _join(
    rank: int,
    ranks: list[Presence],
    listener: socket.socket | None,
    opened: list[int],
    timeout_s: float,
) -> None:
    """Append to ``opened`` the memory's descriptor (rank 0 has it) and one for each process."""
    deadline = time.monotonic() + timeout_s
    if listener is not None:
        for _ in range(len(ranks) - 1):
            listener.settimeout(max(0.0, deadline - time.monotonic()))
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(max(0.0, deadline - time.monotonic()))
                _check_user(connection)
                socket.send_fds(connection, [b"m"], [opened[0]])
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect("\0" + ranks[0].address)
            _check_user(connection)
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if len(descriptors) != 1:
                raise RuntimeError("rank 0 sent no descriptor")
            os.set_inheritable(descriptors[0], False)
            opened.append(descriptors[0])
    for peer, presence in enumerate(ranks):
        opened.append(-1 if peer == rank else _open_process(peer, presence))


def _check_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise RuntimeError(f"a process of user {user} connected, expected user {os.geteuid()}")


def _open_process(peer: int, presence: Presence) -> int:
    descriptor = os.pidfd_open(presence.pid)
    # The start time tells the peer from a later process of the same id.
    if _start_time(presence.pid) != presence.start_time:
        os.close(descriptor)
        raise RuntimeError(f"rank {peer} (process {presence.pid}) has died")
    return descriptor


def _start_time(pid: int) -> int:
    # Field 22; the name, field 2, is in parentheses and may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])
