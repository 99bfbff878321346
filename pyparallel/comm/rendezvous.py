"""How the CPU ranks of a group come to share memory and to watch each other.

The first rank on a machine makes one anonymous memory and hands its descriptor to the others there
through a Unix socket in the abstract namespace, which leaves no file behind; only processes of the
same user get it. Every rank opens a process descriptor (pidfd) of every other, so a death is seen at
once and a reused process id cannot be mistaken for a peer.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch.distributed as dist

from pyparallel._C import create_shared_memory
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.peer_proof import prove
from pyparallel.comm.peer_watch import naming_lost_peers
from pyparallel.limits import MAX_RANKS

# How long whoever connects may take to say which rank it is.
HELLO_S = 1.0


def machine_identity() -> str:
    """Equal for two processes exactly if they can share memory and watch each other this way."""
    namespaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join([boot, *map(str, namespaces)])


@dataclass(frozen=True)
class Presence:
    """What a rank tells the others about itself."""

    pid: int
    start_time: int
    address: str
    error: str | None


@dataclass(frozen=True)
class Meeting:
    """How the ranks of a process group lie on machines, and this machine's shared memory.

    Attributes:
        machines: the ranks of each machine, machines in the order of their first ranks.
        machine: the index of this rank's machine.
        memory: a descriptor of the memory that this machine's ranks share; owned by the caller.
        processes: a descriptor of each of their processes, -1 for this one; owned by the caller.
    """

    machines: tuple[tuple[int, ...], ...]
    machine: int
    memory: int
    processes: list[int]


def meet(
    process_group: dist.ProcessGroup, name: str, *, timeout_s: float, machine: str | None = None
) -> Meeting:
    """Find the ranks of ``process_group`` that share this machine; a call of all its ranks.

    Args:
        machine: what to take for this machine's identity; tests play several machines on one.

    Raises:
        ValueError: more than 64 ranks on a machine.
        PeerError: a rank could not join; every rank raises it, with that rank and the reason.
    """
    with naming_lost_peers(f"meeting of group '{name}'"):
        prove(process_group)
        return _meet(process_group, name, timeout_s, machine)


def _meet(
    process_group: dist.ProcessGroup, name: str, timeout_s: float, machine: str | None
) -> Meeting:
    rank = process_group.rank()
    pid = os.getpid()
    identity = machine_identity() if machine is None else f"{machine_identity()}/{machine}"
    identities = gather_objects(process_group, identity)
    ranks_of: dict[str, list[int]] = {}
    for peer, other in enumerate(identities):
        ranks_of.setdefault(other, []).append(peer)
    for ranks in ranks_of.values():
        if len(ranks) > MAX_RANKS:
            raise ValueError(
                f"group '{name}': expected at most {MAX_RANKS} ranks a machine, got {len(ranks)}"
            )
    local = ranks_of[identity]
    leads = rank == local[0]
    opened: list[int] = []
    listener: socket.socket | None = None
    try:
        error, address = None, ""
        if leads:
            try:
                listener, address = _listen(len(local))
                opened.append(create_shared_memory(len(local)))
            except OSError as problem:
                error = f"{type(problem).__name__}: {problem}"
        own = Presence(pid, _start_time(pid), address, error)
        everyone = [Presence(*told) for told in gather_objects(process_group, astuple(own))]
        _require_none(name, "prepare", [presence.error for presence in everyone])
        presences = [everyone[peer] for peer in local]
        error = _attempt(lambda: _join(local.index(rank), presences, listener, opened, timeout_s))
        _require_none(name, "join", gather_objects(process_group, error))
    except BaseException:
        for descriptor in opened:
            if descriptor >= 0:
                os.close(descriptor)
        raise
    finally:
        if listener is not None:
            listener.close()
    machines = tuple(tuple(ranks) for ranks in ranks_of.values())
    return Meeting(machines, machines.index(tuple(local)), opened[0], opened[1:])


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
    # Strangers may stand in the queue too.
    listener.listen(max(size, socket.SOMAXCONN))
    return listener, address


def _join(
    rank: int,
    ranks: list[Presence],
    listener: socket.socket | None,
    opened: list[int],
    timeout_s: float,
) -> None:
    """Append to ``opened`` the memory's descriptor (its maker has it) and one for each process."""
    deadline = time.monotonic() + timeout_s
    if listener is not None:
        _hand_out(opened[0], ranks, listener, deadline)
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect("\0" + ranks[0].address)
            _check_user(connection)
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if len(descriptors) != 1:
                raise RuntimeError("the memory's maker sent no descriptor")
            os.set_inheritable(descriptors[0], False)
            opened.append(descriptors[0])
    for peer, presence in enumerate(ranks):
        opened.append(-1 if peer == rank else _open_process(peer, presence))


def _hand_out(memory: int, ranks: list[Presence], listener: socket.socket, deadline: float) -> None:
    """Give ``memory`` to each other rank once; whoever else connects is hung up on."""
    missing = {presence.pid: peer for peer, presence in enumerate(ranks)}
    missing.pop(os.getpid(), None)
    while missing:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            late = ", ".join(map(str, missing.values()))
            raise RuntimeError(f"local ranks {late} did not come for the memory") from None
        with connection:
            pid, user, _ = struct.unpack(
                "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            if user == os.geteuid() and pid in missing:
                connection.settimeout(HELLO_S)
                # A rank that died meanwhile is named by its process, below.
                with contextlib.suppress(OSError):
                    socket.send_fds(connection, [b"m"], [memory])
                del missing[pid]


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
        raise RuntimeError(f"local rank {peer} (process {presence.pid}) has died")
    return descriptor


def _start_time(pid: int) -> int:
    # Field 22; the name, field 2, is in parentheses and may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])
