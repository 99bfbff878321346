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
import time
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch.distributed as dist

from pyparallel._C import create_shared_memory
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.memory_door import check_user, hand_out, let_in, listen, take
from pyparallel.comm.peer_proof import prove
from pyparallel.comm.peer_watch import naming_lost_peers
from pyparallel.limits import MAX_RANKS

_machines: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[tuple[int, ...], ...]] = (
    weakref.WeakKeyDictionary()
)


def machine_identity() -> str:
    """Equal for two processes that can share memory and watch each other, and for a machine's clones."""
    return _identity("pid", "net", "user")


def network_identity() -> str:
    """Equal for two processes that have one loopback interface, and for a machine's clones."""
    return _identity("net")


def _identity(*namespaces: str) -> str:
    inodes = [os.stat(f"/proc/self/ns/{name}").st_ino for name in namespaces]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join([boot, *map(str, inodes)])


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
        error = _attempt(lambda: listen(listener, address, process_group.size()))
        own = Presence(pid, _start_time(pid), identity, address, error)
        everyone = [Presence(*told) for told in gather_objects(process_group, astuple(own))]
        _require_none(name, "prepare", [presence.error for presence in everyone])
        connection.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        pids = {peer.pid for peer in everyone if peer.identity == identity} - {pid}
        leads: list[int] = []
        came: list[socket.socket] = []
        closing.callback(lambda: [end.close() for end in came])

        def reach() -> None:
            if (
                not leads
                and (found := _reach_first(rank, everyone, connection, deadline)) is not None
            ):
                leads.append(found)

        # Where strangers fill a queue all ranks make room in theirs, and who found none tries again.
        while True:
            error = _attempt(reach)
            reached = gather_objects(process_group, [leads[0] if leads else None, error])
            _require_none(name, "find", [failed for _, failed in reached])
            if all(other is not None for other, _ in reached):
                break
            let_in(listener, pids, came)
        lead = leads[0]
        ranks_of: dict[int, list[int]] = {}
        for peer, (other, _) in enumerate(reached):
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
                    others = {p.pid: peer for peer, p in enumerate(presences) if p.pid != pid}
                    hand_out(opened[0], others, listener, came, time.monotonic() + timeout_s)
                else:
                    check_user(connection)
                    opened.append(take(connection))
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


def _reach_first(
    rank: int, everyone: list[Presence], connection: socket.socket, deadline: float
) -> int | None:
    """The first rank that is on this machine, maybe this one; ``connection`` leads to it.

    A machine's clone has the same identity, and its sockets other names. None where its queue is full,
    and ``deadline`` has not passed.
    """
    for peer, presence in enumerate(everyone[:rank]):
        if presence.identity != everyone[rank].identity:
            continue
        # A connection that was refused may be asked for again.
        with contextlib.suppress(ConnectionRefusedError):
            try:
                connection.connect("\0" + presence.address)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    return None
                raise RuntimeError(f"strangers fill the queue of rank {peer}'s socket") from None
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
