"""The process that ranks are forked from: it has imported torch once, and ends with its launcher.

It is asked over a socket pair that it inherits, so there is no address that anybody could connect to and
no file to leave behind. A request is a rank's number with the descriptors it takes over; the answer is
the rank's process descriptor (pidfd). The kernel ends the ranks when this process ends (parent-death
signal), stopped ones too; this process ends when its launcher does.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

from pyparallel.ranks.parent_death import die_with_parent

# Of a request: where the rank reports, its store, the job, the launcher's folder and process, and
# where its exit status goes.
DESCRIPTORS = 6
STATUS = struct.Struct("!i")
# The signals that are the launcher's to answer; it starts this process with them blocked.
BLOCKED = (signal.SIGINT, signal.SIGHUP)


def fill_standard_streams() -> None:
    """Open /dev/null as whichever of descriptors 0, 1 and 2 is closed, or another file becomes it."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def serve(control: int, options: dict[str, Any]) -> NoReturn:
    """Fork a rank for each request until the launcher is gone."""
    fill_standard_streams()
    # The launcher alone decides what Ctrl-C and a closed terminal mean for ranks.
    for number in BLOCKED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
    try:
        launcher = os.pidfd_open(options["launcher"])
    except ProcessLookupError:
        os._exit(1)
    if options["lasting"]:
        die_with_parent(options["launcher"])
    elif os.getppid() != options["launcher"]:
        os._exit(1)
    for name in options["preload"]:
        with contextlib.suppress(ImportError):
            __import__(name)
    # A rank's collector would write into the header of every object that it inherits, and so copy their
    # pages: 50 MB a rank.
    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=control)
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    poll = select.poll()
    for descriptor in (control, woken, launcher):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if woken in ready:
            os.read(woken, 4096)
            _reap(statuses)
        if launcher in ready:
            os._exit(0)
        if control in ready:
            message, descriptors, _, _ = socket.recv_fds(channel, 64, DESCRIPTORS)
            if not message:
                os._exit(0)
            _fork(channel, int(message), descriptors, statuses, [woken, wakes, launcher])


def _fork(
    channel: socket.socket,
    rank: int,
    descriptors: list[int],
    statuses: dict[int, int],
    own: list[int],
) -> None:
    server = os.getpid()
    try:
        if len(descriptors) != DESCRIPTORS:
            raise OSError("the limit on open files is too low (ulimit -n)")
        child = os.fork()
    except OSError as error:
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(error).encode())
        return
    if child == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            channel.close()
            for descriptor in (*own, *statuses.values(), descriptors[-1]):
                os.close(descriptor)
            die_with_parent(server)
            from pyparallel.ranks.life import rank_main

            rank_main(rank, *descriptors[:-1])
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    for descriptor in descriptors[:-1]:
        os.close(descriptor)
    statuses[child] = descriptors[-1]
    process = os.pidfd_open(child)
    try:
        socket.send_fds(channel, [str(child).encode()], [process])
    except OSError:
        os._exit(1)
    finally:
        os.close(process)


def _reap(statuses: dict[int, int]) -> None:
    for child in list(statuses):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            descriptor = statuses.pop(child)
            # The launcher may be gone.
            with contextlib.suppress(OSError):
                os.write(descriptor, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(descriptor)


def clear_close_on_exec(descriptor: int) -> int:
    """A copy of ``descriptor`` above the standard streams that a started program inherits."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 3)
