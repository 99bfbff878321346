"""The life of one rank, in the process that the server forked for it."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import process, spawn, util
from multiprocessing.connection import Connection
from typing import Any

from pyparallel.ranks.job import importing, pickler
from pyparallel.ranks.outcome import Report, failure, success
from pyparallel.ranks.parent_death import die_with_parent

# Seconds for torch's groups to close in.
CLOSE_S = 5.0
# In a rank: the pipe to its launcher.
_sender: Connection | None = None
# Its functions and classes go to the launcher as they came: by name, or by value.
_by_value = False
# Where there is no launcher: who hears this process's reports.
_listener: Callable[[int, Any], None] | None = None


def is_rank() -> bool:
    """Whether this process is a rank of a launcher, or was forked by one."""
    return _sender is not None


def report(value: Any) -> None:
    """Send ``value`` to the launcher's ``on_report`` while this rank goes on; nothing elsewhere."""
    if _sender is not None:
        _sender.send_bytes(pickler(_by_value).dumps(Report(value)))
    elif _listener is not None:
        _listener(int(os.environ["RANK"]), value)


@contextlib.contextmanager
def reporting(listener: Callable[[int, Any], None] | None) -> Iterator[None]:
    """Have ``listener`` hear what this process reports, which is a rank that nobody here launched."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def pack_job(setup: dict[str, Any], job: bytes) -> int:
    """A descriptor of memory with what :func:`rank_main` reads; owned by the caller."""
    descriptor = os.memfd_create("rank-job")
    header = json.dumps(setup).encode()
    with open(descriptor, "wb", closefd=False) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(job)
    return descriptor


def rank_main(rank: int, sender: int, store: int, job: int, folder: int, launcher: int) -> None:
    """Run the job, tell what came of it, and return.

    Args:
        sender: of the pipe to the launcher; as all of these a descriptor that is taken over.
        store: of the socket to its store.
        job: of the memory that :func:`pack_job` filled.
        folder: the launcher's current one.
        launcher: of its process.
    """
    global _sender, _by_value
    _sender = Connection(sender, readable=False)
    threading.Thread(target=_end_with_launcher, args=(launcher,), daemon=True).start()
    _enter(folder)
    # Not read(): the ranks share one place in the file.
    memory = mmap.mmap(job, 0, prot=mmap.PROT_READ)
    os.close(job)
    end = 8 + int.from_bytes(memory[:8], "little")
    setup = json.loads(memory[8:end])
    _by_value = setup["by_value"]
    _end_forks_with_this()
    own = process.current_process()
    own.name, own.daemon = f"rank{rank}", True
    _environment(setup["environment"], rank, setup["world_size"])
    try:
        message = _live(rank, setup, store, memory, end)
    except BaseException as error:
        message = failure(error, pickler(_by_value))
    for stream in (sys.stdout, sys.stderr):
        # Closed, or full: what a rank prints is not what it returns.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    _sender.send_bytes(message)
    _sender.close()
    finish()


def _end_forks_with_this() -> None:
    """What the main thread forks here ends with this rank: it would hold its peers' sockets open."""
    rank, by_main = os.getpid(), [False]

    def before() -> None:
        # The kernel's signal comes when the forking thread ends.
        by_main[0] = threading.current_thread() is threading.main_thread()

    def after() -> None:
        if by_main[0] and os.getppid() == rank:
            die_with_parent(rank)

    os.register_at_fork(before=before, after_in_child=after)


def _enter(folder: int) -> None:
    os.fchdir(folder)
    os.close(folder)
    try:
        os.getcwd()
    except FileNotFoundError:
        # It was deleted, and libraries that ask where they are would end the process.
        os.chdir("/")


def _environment(given: dict[str, str], rank: int, world_size: int) -> None:
    # The server was started earlier, perhaps under another environment.
    os.environ.clear()
    os.environ.update(given)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        # Everything is on this machine: no other interface listens, and no host name is looked up.
        GLOO_SOCKET_IFNAME="lo",
        # It asks the store for all peers' addresses at once, not for each twice.
        GLOO_ENABLE_STORE_V2_API="1",
    )


def _live(rank: int, setup: dict[str, Any], store_end: int, memory: mmap.mmap, begin: int) -> bytes:
    import torch
    import torch.distributed as dist

    from pyparallel.comm import peer_proof
    from pyparallel.comm.peer_watch import naming_lost_peers
    from pyparallel.ranks.store import InheritedStore

    world_size = setup["world_size"]
    torch.set_num_threads(setup["threads"])
    on_gpu = torch.cuda.device_count() >= world_size
    if on_gpu:
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=setup["timeout_s"])
    store = InheritedStore(store_end, timeout)
    with naming_lost_peers("start-up", store=store, rank=rank, size=world_size):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        peer_proof.know(bytes.fromhex(setup["secret"]))
        peer_proof.prove(dist.group.WORLD)
        store.set(f"connected/{rank}", "")
    with naming_lost_peers("torch.distributed"):
        with importing(setup["program"]):
            spawn.prepare(setup["program"])
        # Given back before the work, which may last: arguments can be large.
        with memoryview(memory) as whole, whole[begin:] as job:
            fn, args = pickle.loads(job)
        memory.close()
        # A rank that fails closes nothing first: closing may wait for peers that wait for this one.
        message = success(fn(*args), pickler(_by_value))
        from pyparallel.comm.group_of import close_groups

        close_groups()
        # A peer that is still connecting would take this rank's end for a failure.
        store.wait([f"connected/{peer}" for peer in range(world_size)], timeout)
        # A group with a broken connection may wait for ever, and this process ends now anyway.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        # At a limit on threads it is left to the end of the process.
        with contextlib.suppress(RuntimeError):
            closing.start()
            closing.join(min(setup["timeout_s"], CLOSE_S))
    return message


def _end_with_launcher(launcher: int) -> None:
    """A rank whose launcher was killed ends too, even from inside a collective.

    The server ends with the launcher, and the kernel ends the ranks with the server; where the server
    is stopped, it is ended from here.
    """
    poll = select.poll()
    poll.register(launcher, select.POLLIN)
    poll.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def finish() -> None:
    """What a process of multiprocessing does at its end: threads and queues are waited for."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    util._exit_function()
