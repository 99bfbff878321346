"""The launcher's side of the server that ranks are forked from: it starts, asks and watches."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

from pyparallel.ranks.server import BLOCKED, STATUS, clear_close_on_exec

# What nearly every program of ranks imports, where the launcher itself may have had no need of it.
PRELOAD = (
    "torch",
    "torch.distributed",
    "pyparallel.launch",
    "pyparallel.decoding.generate",
    "pyparallel.layers",
    "pyparallel.mesh",
    "pyparallel.models.load",
    "pyparallel.models.parallelize",
    "pyparallel.training.loss",
)
# What takes long to import, and ranks are likely to need where the launcher has imported it.
PRELOAD_TOO = ("pyparallel.saving.save", "pyparallel.training.data", "pyparallel.training.pipeline")
# Of the commands that start ranks, what these need beside it.
PRELOAD_OF = {
    "generate": ("pyparallel.commands.generate_ranks",),
    "train": ("pyparallel.commands.train_ranks", *PRELOAD_TOO),
}
# How often a process that does not answer is looked at.
LOOK_S = 0.2
# The first statement of a program has the current folder on the path of its imports; this one needs none
# but `sys`, which is built in. What is left is what this interpreter searches by itself, as far as the
# launcher does too; the launcher's own folders come last, and only where that does not find us.
BOOT = """
import sys
given = sys.argv[3].splitlines()
sys.path[:] = [entry for entry in sys.path if entry and entry in given]
try:
    import torch, pyparallel.ranks.server
except ImportError:
    sys.path += [entry for entry in given if entry and entry not in sys.path]
import json
from pyparallel.ranks.server import serve
serve(int(sys.argv[1]), json.loads(sys.argv[2]))
"""


class StartError(RuntimeError):
    """The machine did not let a process start."""


class RankProcess:
    """A process that the server forked. Its exit status comes through ``sentinel``."""

    def __init__(self, pid: int, handle: int, sentinel: int) -> None:
        self.pid = pid
        self.sentinel = sentinel
        self._handle = handle
        self._code: int | None = None
        self._over = False

    @property
    def exitcode(self) -> int | None:
        """As of ``multiprocessing``; None while it runs, or where nobody could say."""
        self.join(0)
        return self._code

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process is gone, at most so many seconds."""
        if self._over:
            return
        poll = select.poll()
        poll.register(self.sentinel, select.POLLIN)
        if poll.poll(None if timeout is None else timeout * 1000):
            status = os.read(self.sentinel, STATUS.size)
            self._code = STATUS.unpack(status)[0] if status else None
            self._over = True

    def is_alive(self) -> bool:
        """Whether it runs, or is stopped."""
        self.join(0)
        return not self._over

    def is_stopped(self) -> bool:
        """Whether a signal holds it."""
        return not self._over and state_of(self.pid) == "T"

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # A process descriptor: a later process of the same number is never hit.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def close(self) -> None:
        os.close(self._handle)
        os.close(self.sentinel)


class _Server:
    """The server of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner = 0
        self.process: subprocess.Popen | None = None
        self.channel: socket.socket | None = None

    def ensure(self, preload: Sequence[str] = ()) -> None:
        """Start the process, if there is none; it imports ``preload`` too."""
        if self.owner == os.getpid() and self.process.poll() is None:
            return
        if self.channel is not None:
            self.channel.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inherited = clear_close_on_exec(theirs.fileno())
        theirs.close()
        options = {
            "launcher": os.getpid(),
            # The kernel's signal comes when the starting thread ends, not the process.
            "lasting": threading.current_thread() is threading.main_thread(),
            # A program that told multiprocessing what its processes need tells us too.
            "preload": [
                *PRELOAD,
                *preload,
                *(name for name in PRELOAD_TOO if name in sys.modules),
                *(name for name in _asked_for() if name != "__main__"),
            ],
        }
        given = [*sys.path, str(Path(__file__).resolve().parents[2])]
        command = [
            *(sys.executable, *subprocess._args_from_interpreter_flags(), "-c", BOOT),
            *(str(inherited), json.dumps(options), "\n".join(given)),
        ]
        # A Ctrl-C is for the launcher; a terminal sends it to the server too, which begins deaf to it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(inherited,), cwd=_start_folder()
            )
        except OSError as error:
            raise StartError(f"the server of ranks could not be started: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(inherited)
        self.channel, self.owner = ours, os.getpid()

    def fork(self, rank: int, descriptors: list[int], timeout_s: float) -> RankProcess:
        """Have a rank forked that takes over ``descriptors``; this process keeps its own."""
        with self.lock:
            self.ensure()
            sentinel, status = os.pipe()
            try:
                answer, handles = self._ask(rank, [*descriptors, status], timeout_s)
            except BaseException:
                os.close(sentinel)
                raise
            finally:
                os.close(status)
            if handles:
                return RankProcess(int(answer), handles[0], sentinel)
            os.close(sentinel)
            raise StartError(f"could not be started: {answer.decode()}")

    def _ask(self, rank: int, descriptors: list[int], timeout_s: float) -> tuple[bytes, list[int]]:
        """The answer to one request; the server may be importing, or stopped, or dead."""
        stopped_since = None
        self.channel.settimeout(LOOK_S)
        try:
            socket.send_fds(self.channel, [str(rank).encode()], descriptors)
            while True:
                try:
                    answer, handles, _, _ = socket.recv_fds(self.channel, 4096, 1)
                    break
                except TimeoutError:
                    now = time.monotonic()
                    stopped = state_of(self.process.pid) == "T"
                    stopped_since = (stopped_since or now) if stopped else None
                    if stopped and now - stopped_since > timeout_s:
                        self.end()
                        raise StartError(
                            f"the process that ranks are forked from is stopped, for {timeout_s:g} s"
                        ) from None
            if answer:
                return answer, handles
            reason = ""
        except (BrokenPipeError, ConnectionResetError) as error:
            reason = f" ({error})"
        except BaseException:
            # Its answer would be taken for the next request's.
            self.end()
            raise
        self.end()
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        raise StartError(f"the process that ranks are forked from ended: {how}{reason}")

    def end(self) -> None:
        """Kill the server, and with it all its ranks."""
        self.process.kill()
        self.process.wait()


def state_of(pid: int) -> str:
    """The letter that the kernel gives a process: T for one that a signal stopped; "" for none."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _asked_for() -> Sequence[str]:
    return getattr(forkserver._forkserver, "_preload_modules", ())


def _start_folder() -> str | None:
    """The current folder, or the root where it was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "/"
    return None


server = _Server()


def start_early(command: str) -> None:
    """Start the server of a command that will ask for ranks, to import while the command prepares."""
    with server.lock, contextlib.suppress(StartError):
        # Who launches is told why it can't be.
        server.ensure(PRELOAD_OF[command])


@atexit.register
def end_server() -> None:
    """End this process's server, if it has one, and with it all ranks."""
    if server.process is not None and server.owner == os.getpid():
        server.end()
