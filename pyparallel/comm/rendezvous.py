"""How the CPU ranks of a group come to share memory and to watch each other.

The first rank on a machine makes one anonymous memory and hands its descriptor to the others there
through a Unix socket in the abstract namespace, which leaves no file behind; only processes of the
same user get it. Every rank opens a process descriptor (pidfd) of every other, so a death is seen at
once and a reused process id cannot be mistaken for a peer.

Who is on one machine is found out by trying: machines that were cloned while they ran say the same of
themselves, but none of them is reached through another's socket.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
import weakref
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

_machines: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[tuple[int, ...], ...]] = (
    weakref.WeakKeyDictionary()
)


def machine_identity() -> str:
    """Equal for two processes that can share memory and watch each other, and for a machine's clones."""
    namespaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join([boot, *map(str, namespaces)])


@dataclass(frozen=True)
class Presence:
    """What a rank tells the others about itself: its process, its machine, and where it listens."""

    pid: int
    start_time: int
    identity: str
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


def machines_of(process_group: dist.ProcessGroup) -> tuple[tuple[int, ...], ...]:
    """The ranks of each machine, as the group's last meeting found them; a call of all its ranks."""
    if process_group in _machines:
        return _machines[process_group]
    ranks_of: dict[str, list[int]] = {}
    for rank, identity in enumerate(gather_objects(process_group, machine_identity())):
        ranks_of.setdefault(identity, []).append(rank)
    return tuple(tuple(ranks) for ranks in ranks_of.values())


def _meet(
    process_group: dist.ProcessGroup, name: str, timeout_s: float, machine: str | None
) -> Meeting:
    rank = process_group.rank()
    pid = os.getpid()
    identity = machine_identity() if machine is None else f"{machine_identity()}/{machine}"
    opened: list[int] = []
    with contextlib.ExitStack() as closing, contextlib.ExitStack() as failing:
        listener = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        address = f"pyparallel-{secrets.token_hex(16)}"
        error = _attempt(lambda: _listen(listener, address, process_group.size()))
        own = Presence(pid, _start_time(pid), identity, address, error)
        everyone = [Presence(*told) for told in gather_objects(process_group, astuple(own))]
        _require_none(name, "prepare", [presence.error for presence in everyone])
        connection.settimeout(timeout_s)
        lead = _reach_first(rank, everyone, connection)
        ranks_of: dict[int, list[int]] = {}
        for peer, other in enumerate(gather_objects(process_group, lead)):
            ranks_of.setdefault(other, []).append(peer)
        for ranks in ranks_of.values():
            if len(ranks) > MAX_RANKS:
                raise ValueError(
                    f"group '{name}': expected at most {MAX_RANKS} ranks a machine, got {len(ranks)}"
                )
        local = ranks_of[lead]
        failing.callback(_close, opened)

        def join() -> None:
            presences = [everyone[peer] for peer in local]
            try:
                if rank == lead:
                    opened.append(create_shared_memory(len(local)))
                    _hand_out(opened[0], presences, listener, time.monotonic() + timeout_s)
                else:
                    _check_user(connection)
                    opened.append(_take(connection))
            finally:
                # Whoever is left waits for this rank no longer.
                listener.close()
            opened.extend(
                -1 if other == rank else _open_process(peer, presence)
                for peer, (other, presence) in enumerate(zip(local, presences, strict=True))
            )

        _require_none(name, "join", gather_objects(process_group, _attempt(join)))
        failing.pop_all()
    machines = tuple(tuple(ranks) for ranks in ranks_of.values())
    _machines[process_group] = machines
    return Meeting(machines, machines.index(tuple(local)), opened[0], opened[1:])


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def _reach_first(rank: int, everyone: list[Presence], connection: socket.socket) -> int:
    """The first rank that is on this machine, maybe this one; ``connection`` leads to it.

    A machine's clone has the same identity, and its sockets other names.
    """
    for peer, presence in enumerate(everyone[:rank]):
        if presence.identity != everyone[rank].identity:
            continue
        # A connection that was refused may be asked for again.
        with contextlib.suppress(ConnectionRefusedError):
            connection.connect("\0" + presence.address)
            return peer
    return rank


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


def _listen(listener: socket.socket, address: str, size: int) -> None:
    listener.bind("\0" + address)
    # Strangers may stand in the queue too.
    listener.listen(max(size, socket.SOMAXCONN))


def _take(connection: socket.socket) -> int:
    """The descriptor that the memory's maker sends."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if len(descriptors) != 1:
        raise RuntimeError("the memory's maker sent no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


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
            pid, user, _ = _credentials(connection)
            if user == os.geteuid() and pid in missing:
                connection.settimeout(HELLO_S)
                # A rank that died meanwhile is named by its process, below.
                with contextlib.suppress(OSError):
                    socket.send_fds(connection, [b"m"], [memory])
                del missing[pid]


def _check_user(connection: socket.socket) -> None:
    _, user, _ = _credentials(connection)
    if user != os.geteuid():
        raise RuntimeError(f"a process of user {user} connected, expected user {os.geteuid()}")


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end, as the kernel has them."""
    pid, user, group = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return pid, user, group


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
