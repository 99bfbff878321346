"""Who is still there: deaths on this machine noticed in a fraction of a second, roll calls elsewhere."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed as dist

from pyparallel.comm.communicator import PeerError
from pyparallel.comm.lost_hosts import lost_among

POLL_S = 0.1
# How long survivors wait for one another's word before they call a rank missing.
ROLL_CALL_S = 1.0


def meet_neighbours(store: dist.Store, rank: int, size: int) -> dict[int, int]:
    """Process ids of the other ranks on this machine; a call of all ranks."""
    store.set(f"process/{rank}", f"{_machine()} {os.getpid()}")
    processes = {}
    for other in range(size):
        machine, process = store.get(f"process/{other}").decode().split()
        if other != rank and machine == _machine():
            processes[other] = int(process)
    return processes


def roll_call(
    store: dist.Store,
    rank: int,
    size: int,
    *,
    what: str = "alive",
    seconds: float = ROLL_CALL_S,
) -> tuple[int, ...]:
    """Ranks that do not answer; called by every rank whose group has failed, or that is `what`."""
    silent = [r for r in range(size) if r != rank]
    deadline = time.monotonic() + seconds
    try:
        store.set(f"{what}/{rank}", "here")
        while silent and time.monotonic() < deadline:
            silent = [r for r in silent if not store.check([f"{what}/{r}"])]
            time.sleep(0.02 * bool(silent))
    except RuntimeError:
        # Who holds the store is gone; then nobody's answer can be heard.
        pass
    return tuple(silent)


def bounded_roll_call(store: dist.Store, rank: int, size: int) -> tuple[int, ...] | None:
    """:func:`roll_call`, or None if the store itself can't be reached: its machine is cut off."""
    found: list[tuple[int, ...]] = []

    def call() -> None:
        # A store that was closed or refuses raises; one behind a dead link answers nothing.
        with suppress(RuntimeError):
            found.append(roll_call(store, rank, size))

    thread = threading.Thread(target=call, name="pyparallel-roll-call", daemon=True)
    thread.start()
    thread.join(2 * ROLL_CALL_S)
    return found[0] if found else None


@contextmanager
def naming_lost_peers(
    what: str, *, store: dist.Store | None = None, rank: int = 0, size: int = 0
) -> Iterator[None]:
    """Inside it what torch.distributed says of a lost peer becomes a :class:`PeerError` naming it.

    Args:
        what: is done inside, for the message.
        store, rank, size: of the ranks that do it; by default torch's world, once there is one.
    """
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        if hidden := peer_error_behind(error):
            # torch's pipelines tell what failed as an error of their own.
            raise retold(hidden, str(hidden)) from error
        if "too many open files" in str(error).lower():
            raise OSError(errno.EMFILE, f"{what}: too many open files; raise ulimit -n") from error
        if not _of_a_peer(error):
            raise
        if store is None and dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            rank, size = dist.get_rank(), dist.get_world_size()
        missing = lost_among(range(size))
        if missing is None and store is not None:
            missing = bounded_roll_call(dist.PrefixStore("pyparallel/lost", store), rank, size)
        if missing is None:
            who = "unknown, since the store can't be reached either"
        else:
            who = ", ".join(map(str, missing)) or "none"
        named = PeerError(
            f"{what} (rank {rank} of {size}) failed, missing ranks: {who} "
            f"({str(error).splitlines()[0][:200]})"
        )
        named.operation, named.group, named.missing = what, "world", missing or ()
        raise named from error


def retold(error: PeerError, message: str) -> PeerError:
    """The same loss in other words: operation, call, group and missing ranks stay."""
    named = PeerError(message)
    vars(named).update(vars(error))
    return named


def peer_error_behind(error: BaseException) -> PeerError | None:
    """The PeerError that an error tells of in its own words, if one does."""
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        if isinstance(behind, PeerError):
            return behind
        seen.add(id(behind))
        behind = behind.__cause__ or behind.__context__
    return None


def _of_a_peer(error: RuntimeError) -> bool:
    """Whether torch or Gloo says so; an error of the caller's own stays what it is."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(word in text for word in ("gloo", "peer", "socket"))


def _machine() -> str:
    """The same for two processes exactly if a process id means the same to both."""
    namespace = os.readlink("/proc/self/ns/pid")
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{socket.gethostname()}/{namespace}".replace(" ", "")


class PeerWatch:
    """A thread that waits for the deaths of other processes, and calls back once.

    Args:
        processes: process id of each rank on this machine, this one's own left out.
        on_death: called with the ranks that died, from the watching thread.
        tick: called every `POLL_S` seconds meanwhile; the watch ends when it returns False.
    """

    def __init__(
        self,
        processes: Mapping[int, int],
        on_death: Callable[[list[int]], None],
        *,
        tick: Callable[[], bool] | None = None,
    ) -> None:
        self.on_death, self.tick = on_death, tick
        self.ranks: dict[int, int] = {}
        self.gone: list[int] = []
        for rank, process in processes.items():
            try:
                # A descriptor names this very process, also if its number is used again.
                self.ranks[os.pidfd_open(process)] = rank
            except ProcessLookupError:
                self.gone.append(rank)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="pyparallel-peers", daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        poll = select.poll()
        for descriptor in self.ranks:
            poll.register(descriptor, select.POLLIN)
        dead = list(self.gone)
        while not dead and not self.stopped.is_set():
            # A descriptor of a process becomes readable when the process ends.
            dead = [self.ranks[descriptor] for descriptor, _ in poll.poll(POLL_S * 1000)]
            # The death is the reason to tell, not what the tick finds because of it.
            if not dead and self.tick is not None and not self.tick():
                return
        if dead and not self.stopped.is_set():
            self.on_death(sorted(dead))

    def close(self) -> None:
        """Ends the thread and gives the descriptors back."""
        self.stopped.set()
        if self.thread is not threading.current_thread():
            self.thread.join()
        for descriptor in self.ranks:
            os.close(descriptor)
        self.ranks = {}
