"""Start ranks on this machine, collect what they return, and leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from pyparallel.communicator import PeerError

# Seconds in which the other ranks' failures are still heard after the first one: a rank that lost its
# peer may report sooner than the operating system reports the peer's death.
SETTLE_S = 0.3
# Seconds between the request to end and the kill.
GRACE_S = 2.0


class RankError(RuntimeError):
    """A rank failed. ``rank`` says which, ``__cause__`` is its exception (if it lived to raise one)."""

    def __init__(self, rank: int, world_size: int, reason: str, remote_traceback: str = "") -> None:
        self.rank = rank
        self.world_size = world_size
        self.reason = reason
        self.remote_traceback = remote_traceback
        super().__init__(
            f"rank {rank} of {world_size}: {reason}"
            + (f"\n\n{remote_traceback}" if remote_traceback else "")
        )


@dataclass
class _Outcome:
    """What one rank came to."""

    value: Any = None
    error: BaseException | None = None
    reason: str | None = None
    trace: str = ""

    def gravity(self) -> int:
        """Causes before consequences: a death, then an error of its own, then the loss of a peer."""
        if self.error is None:
            return 0
        return 2 if isinstance(self.error, PeerError) else 1


@dataclass
class _Report:
    """What a rank tells on its way."""

    value: Any


# In a rank: the pipe to its launcher.
_sender: connection.Connection | None = None


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
    and its results must be picklable; define ``fn`` at the top level of a module.

    Args:
        threads: intra-op threads per rank; by default the machine's cores divided by ``world_size``.
        timeout_s: how long a collective may wait for a peer, in seconds.
        on_report: called here with (rank, value) for each :func:`report` of a rank, as it comes.

    Raises:
        ValueError: ``world_size`` is below 1, ``fn`` or an argument can't be pickled, or a rank calls.
        RankError: the first failure of a rank, with its rank and traceback. The other ranks have been
            ended by then, and no process is left.
    """
    if world_size < 1:
        raise ValueError(f"world_size: expected at least 1, got {world_size}")
    if multiprocessing.current_process().daemon:
        raise ValueError("launch: called by a rank; ranks start no ranks of their own")
    # Once for all ranks, and by value: multiprocessing would share the memory of tensors.
    job = _pickled(fn, args)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pyparallel.launch"])
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    setup = (world_size, store.port, threads, timeout_s, dict(os.environ))
    ranks: list[tuple[BaseProcess, connection.Connection]] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(sender, job, rank, *setup),
                name=f"rank{rank}",
                daemon=True,
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        results = _collect(ranks, on_report)
        for process, _ in ranks:
            process.join(GRACE_S)
        return results
    finally:
        _end([process for process, _ in ranks])
        for _, receiver in ranks:
            receiver.close()


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except Exception as error:
        raise ValueError(
            f"launch: fn and its arguments must be picklable, got {type(error).__name__}: {error}; "
            f"define fn at the top level of a module"
        ) from error


def report(value: Any) -> None:
    """Send ``value`` to the launcher's ``on_report`` while this rank goes on; nothing elsewhere."""
    if _sender is not None:
        _sender.send_bytes(pickle.dumps(_Report(value)))


def _collect(
    ranks: list[tuple[BaseProcess, connection.Connection]],
    on_report: Callable[[int, Any], None] | None,
) -> list[Any]:
    outcomes: dict[int, _Outcome] = {}
    waiting = dict(enumerate(ranks))
    deadline = None
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = connection.wait([receiver for _, receiver in waiting.values()], left)
        if not ready and deadline is not None:
            break
        for rank, (process, receiver) in list(waiting.items()):
            if receiver in ready:
                message = _message(process, receiver)
                if isinstance(message, _Report):
                    if on_report is not None:
                        on_report(rank, message.value)
                    continue
                outcomes[rank] = message
                del waiting[rank]
        if deadline is None and any(outcome.reason for outcome in outcomes.values()):
            deadline = time.monotonic() + SETTLE_S
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.reason}
    if failed:
        # min keeps the first of equals, and the dict is in the order of arrival.
        rank = min(failed, key=lambda r: failed[r].gravity())
        first = failed[rank]
        raise RankError(rank, len(ranks), first.reason, first.trace) from first.error
    return [outcomes[rank].value for rank in range(len(ranks))]


def _message(process: BaseProcess, receiver: connection.Connection) -> _Outcome | _Report:
    """Read a rank's message; the pipe's end without one means that the rank died."""
    try:
        message = receiver.recv_bytes()
    except (EOFError, OSError):
        # OSError: the rank died in the middle of its message.
        process.join(GRACE_S)
        code = process.exitcode
        if code is not None and code < 0:
            return _Outcome(reason=f"killed by {signal.Signals(-code).name}")
        return _Outcome(reason=f"ended with exit status {code} before it returned")
    try:
        return pickle.loads(message)
    except Exception as error:
        return _Outcome(
            reason=f"its result can't be unpickled here: {type(error).__name__}: {error}"
        )


def _end(processes: list[BaseProcess]) -> None:
    """End what still runs, politely and then not, and reap it."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _rank_main(
    sender: connection.Connection,
    job: bytes,
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    timeout_s: float,
    environment: dict[str, str],
) -> None:
    """The life of one rank."""
    global _sender
    _sender = sender
    # Ctrl-C reaches the whole terminal group; the parent alone decides what becomes of the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The server was started earlier, perhaps under another environment.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    # Everything is on this machine: no look-up of its host name, which may fail or point outside.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(threads)
        on_gpu = torch.cuda.device_count() >= world_size
        if on_gpu:
            torch.cuda.set_device(rank)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        store.set(f"connected/{rank}", "")
        fn, args = pickle.loads(job)
        # A rank that fails closes nothing first: closing may wait for peers that wait for this one.
        message = _success(fn(*args))
        from pyparallel.mesh import close_meshes

        close_meshes()
        # A peer that is still connecting would take this rank's end for a failure.
        store.wait([f"connected/{peer}" for peer in range(world_size)], timeout)
        dist.destroy_process_group()
    except BaseException as error:
        message = _failure(error)
    sys.stdout.flush()
    sender.send_bytes(message)
    sender.close()


def _success(value: Any) -> bytes:
    try:
        return pickle.dumps(_Outcome(value=value))
    except Exception as error:
        raise TypeError(
            f"the result of fn must be picklable, got {type(value).__name__}: {error}"
        ) from error


def _failure(error: BaseException) -> bytes:
    reason = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    try:
        message = pickle.dumps(_Outcome(error=error, reason=reason, trace=trace))
        pickle.loads(message)
        return message
    except Exception:
        # An exception that does not survive pickling is still told by its text.
        return pickle.dumps(_Outcome(reason=reason, trace=trace))


def _end_with_parent() -> None:
    """A rank whose launcher was killed ends too, even from inside a collective."""
    parent = multiprocessing.parent_process()
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
