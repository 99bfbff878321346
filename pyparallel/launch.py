"""Start ranks on this machine, collect what they return, and leave nothing behind."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import secrets
import time
import warnings
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from pyparallel.limits import (
    check_environment,
    check_process_limit,
    check_ranks,
    check_threads,
    check_timeout,
    cores,
)
from pyparallel.ranks.job import (
    MissingGuardError,
    by_value,
    check_not_importing,
    pickled,
    preparation,
)
from pyparallel.ranks.joined import run_joined
from pyparallel.ranks.life import is_rank, pack_job, report
from pyparallel.ranks.outcome import GRACE_S, Inbox, Outcome, RankError, Report, message_of
from pyparallel.ranks.outcome import failure as _failure  # noqa: F401
from pyparallel.ranks.process import LOOK_S, RankProcess, StartError, server
from pyparallel.ranks.store import StoreServer
from pyparallel.ranks.torchrun import world_of_torchrun

__all__ = ["RankError", "launch", "report"]

# Seconds in which the other ranks' failures are still heard after the first one: a rank that lost its
# peer may report sooner than the operating system reports the peer's death.
SETTLE_S = 0.3

_warned = False

Rank = tuple[RankProcess, connection.Connection]


def launch(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    threads: int | None = None,
    timeout_s: float = 300.0,
    on_report: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Run ``fn(*args)`` on ``world_size`` new ranks of this machine; return their results by rank.

    Each rank is a process with torch.distributed initialised, so ``fn`` begins with
    :func:`pyparallel.init_mesh`, just as it does under torchrun. Ranks are forked from a clean server
    process that has imported torch once, so a start costs tens of milliseconds. ``fn``, its arguments
    and its results must be picklable; define ``fn`` at the top level of a module, or of a script that
    launches under ``if __name__ == "__main__":``. Where there is no file (a notebook, the prompt,
    ``-c``, standard input) they go by value, by cloudpickle. See docs/launch.md.

    Under torchrun the ranks are its own: ``fn`` runs in this process, which every one of them calls, and
    all return all results, which are JSON and tensors then.

    Ranks meet through descriptors that they inherit, and talk over the loopback interface; nobody else
    can join (docs/security.md). They end when this process ends, however it does.

    Args:
        world_size: 1 to 64.
        threads: intra-op threads per rank, at most 4 a core (16 always may be); by default the machine's
            cores divided by ``world_size``.
        timeout_s: how long a collective may wait for a peer, and a rank may be stopped, in seconds.
        on_report: called here with (rank, value) for each :func:`report` of a rank, as it comes.

    Raises:
        ValueError: a number that this machine can't serve, ``fn`` or an argument can't be pickled, a
            rank calls, the script that calls has no guard, or torchrun started another number of ranks.
        RankError: the first failure of a rank, with its rank and traceback. The other ranks have been
            ended by then, and no process is left.
    """
    check_not_importing()
    world_size = check_ranks("world_size", world_size)
    if is_rank() or multiprocessing.current_process().daemon:
        raise ValueError("launch: called by a rank; ranks start no ranks of their own")
    timeout_s = check_timeout("timeout_s", timeout_s)
    if world_of_torchrun() > 1:
        if threads is not None:
            threads = check_threads("threads", threads, world_size)
        return run_joined(
            fn, world_size, args, threads=threads, timeout_s=timeout_s, on_report=on_report
        )
    if threads is None:
        threads = max(1, cores() // world_size)
    threads = check_threads("threads", threads, world_size)
    check_environment()
    check_process_limit(world_size, threads)
    _warn_of_many(world_size, threads)
    setup = {
        "world_size": world_size,
        "threads": threads,
        "timeout_s": timeout_s,
        "secret": secrets.token_hex(32),
        "environment": dict(os.environ),
        "program": preparation(),
        "by_value": by_value(),
    }
    ranks: list[Rank] = []
    store = StoreServer()
    with contextlib.ExitStack() as owned:
        # Once for all ranks, and by value: multiprocessing would share the memory of tensors.
        job = pack_job(setup, pickled(fn, args))
        owned.callback(os.close, job)
        folder = os.open(".", os.O_PATH)
        owned.callback(os.close, folder)
        own = os.pidfd_open(os.getpid())
        owned.callback(os.close, own)
        owned.callback(store.close)
        owned.callback(_close, ranks)
        for rank in range(world_size):
            ranks.append(_start(rank, world_size, store, [job, folder, own], timeout_s))
        results = _collect(ranks, on_report, timeout_s)
        for process, _ in ranks:
            process.join(GRACE_S)
        return results


def _start(
    rank: int, world_size: int, store: StoreServer, shared: list[int], timeout_s: float
) -> Rank:
    """A rank, and the end of the pipe through which it tells."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    try:
        with sender, store.channel() as channel:
            descriptors = [sender.fileno(), channel.fileno(), *shared]
            return server.fork(rank, descriptors, timeout_s), receiver
    except BaseException as error:
        receiver.close()
        if isinstance(error, StartError):
            raise RankError(rank, world_size, str(error)) from None
        raise


def _warn_of_many(world_size: int, threads: int) -> None:
    """Once in a process: more threads than cores make every rank wait for the others' turns."""
    global _warned
    if world_size * threads <= cores() or _warned:
        return
    _warned = True
    warnings.warn(
        f"launch: {world_size} ranks x {threads} threads on {cores()} cores: ranks that wait for each "
        f"other share a core, and all are slow; use at most {cores()} threads over all ranks",
        stacklevel=3,
    )


def _message(process: Any, receiver: connection.Connection) -> Outcome | Report | None:
    return message_of(process, Inbox(receiver))


def _collect(
    ranks: list[Rank],
    on_report: Callable[[int, Any], None] | None,
    timeout_s: float = math.inf,
) -> list[Any]:
    outcomes: dict[int, Outcome] = {}
    waiting = {rank: (process, Inbox(receiver)) for rank, (process, receiver) in enumerate(ranks)}
    stopped = _Stopped(timeout_s)
    deadline = None
    while waiting:
        left = LOOK_S if deadline is None else max(0.0, deadline - time.monotonic())
        # A process that a rank forked may hold its pipe: the end of the rank itself is watched too.
        watched: set[Any] = {inbox.receiver for _, inbox in waiting.values()}
        watched |= {p.sentinel for p, _ in waiting.values() if hasattr(p, "sentinel")}
        ready = connection.wait(list(watched), left)
        if deadline is not None and (not ready or time.monotonic() > deadline):
            break
        for rank, (process, inbox) in list(waiting.items()):
            gone = getattr(process, "sentinel", None) in ready
            while gone or inbox.receiver in ready:
                message = message_of(process, inbox, gone=gone)
                if message is None:
                    break
                if isinstance(message, Report):
                    if on_report is not None:
                        on_report(rank, message.value)
                    continue
                outcomes[rank] = message
                del waiting[rank]
                break
        if too_long := stopped.too_long(waiting):
            reason = f"stopped by a signal, for the {timeout_s:g} s that a call may wait"
            outcomes[too_long[0]] = Outcome(reason=reason)
            break
        if deadline is None and any(outcome.reason for outcome in outcomes.values()):
            deadline = time.monotonic() + SETTLE_S
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.reason}
    if failed:
        # min keeps the first of equals, and the dict is in the order of arrival.
        rank = min(failed, key=lambda r: failed[r].gravity())
        first = failed[rank]
        if isinstance(first.error, MissingGuardError):
            raise first.error from None
        held = stopped.now(waiting) if first.gravity() == 2 else []
        if held:
            told = f"stopped by a signal, and the others could not wait: {first.reason}"
            raise RankError(held[0], len(ranks), told, first.trace) from first.error
        raise RankError(rank, len(ranks), first.reason or "", first.trace) from first.error
    return [outcomes[rank].value for rank in range(len(ranks))]


class _Stopped:
    """Which ranks a signal holds, and for how long: nobody else can tell of them."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._since: dict[int, float] = {}

    def now(self, waiting: dict[int, tuple[Any, Inbox]]) -> list[int]:
        """The ranks that are stopped."""
        return [r for r, (p, _) in waiting.items() if getattr(p, "is_stopped", bool)()]

    def too_long(self, waiting: dict[int, tuple[Any, Inbox]]) -> list[int]:
        """Those that have been for the timeout."""
        now, stopped = time.monotonic(), self.now(waiting)
        self._since = {rank: self._since.get(rank, now) for rank in stopped}
        return [rank for rank in stopped if now - self._since[rank] >= self._timeout_s]


def _close(ranks: list[Rank]) -> None:
    _end([process for process, _ in ranks])
    for _, receiver in ranks:
        receiver.close()


def _end(processes: list[RankProcess]) -> None:
    """End what still runs, politely and then not, and reap it."""
    for process in processes:
        if process.is_stopped():
            # It would not hear a polite word.
            process.kill()
        elif process.is_alive():
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
