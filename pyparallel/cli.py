"""The command line: ``pyparallel`` and one of :data:`COMMANDS`.

Each command is a module of :mod:`pyparallel.commands` with ``add_arguments(parser)`` and ``run(args)``.
Exit status: 0; 1 where ranks failed, a check did not hold or the system refused; 2 for a mistake in what
was asked; 128 + the signal's number where one ended it; 141 where nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import FrameType
from typing import NoReturn

from pyparallel.commands.start import drop, is_command, say
from pyparallel.limits import check_environment
from pyparallel.ranks.process import end_server
from pyparallel.ranks.torchrun import is_first
from pyparallel.version import __version__

COMMANDS = {
    "generate": "answer prompts with a model cut over the ranks of this machine",
    "train": "fine-tune a model on text, cut over the ranks of this machine",
    "export": "write a checkpoint, sharded or GGUF, as one Hugging Face folder",
    "merge": "put together what hosts wrote of a checkpoint, each its own part",
    "plan": "which strategies a model wants on a cluster, how fast, and why",
    "draw": "a picture of what each rank holds, and of the messages of one layer",
    "doctor": "what this machine and this build offer",
    "kernels": "compile the Triton kernels ahead of time and show what they take",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Ended(BaseException):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        say(message)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    with _signals():
        try:
            with _told_once():
                status = _run(argv)
            sys.stdout.flush()
            return status
        except (_Ended, KeyboardInterrupt) as ended:
            number = getattr(ended, "number", signal.SIGINT)
            say(f"ended by {signal.Signals(number).name}")
            if is_command():
                # Taking the interpreter apart takes seconds on a busy machine; nothing is left to do.
                end_server()
                os._exit(128 + number)
            return 128 + number
        except BrokenPipeError:
            # `| head -1`: as other programs, quietly.
            drop(1)
            return 128 + signal.SIGPIPE
        except Exception as error:
            return _report(error)


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="pyparallel", description="Many devices work on one transformer.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check_environment()
    words = sys.argv[1:] if argv is None else argv
    for name, text in COMMANDS.items():
        of_command = commands.add_parser(name, help=text, description=text)
        # Only what is asked for is imported; where that takes long, its flags have a file of their own.
        if name in words:
            flags = f"pyparallel.commands.{name}_flags"
            module = flags if find_spec(flags) else f"pyparallel.commands.{name}"
            import_module(module).add_arguments(of_command)
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that can't show a character shows its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    return import_module(f"pyparallel.commands.{args.command}").run(args)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """What all of torchrun's ranks would tell, the first one tells; each tells its own failures."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _writable() -> bool:
    """Whether standard output takes what was printed; if not, it is not asked again."""
    try:
        # What failed before was forgotten with the failure.
        os.write(1, b"\n")
        return True
    except OSError:
        drop(1)
        return False


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Signals that end the command do it through its clean-up; a second one finds none to wait for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Both what a plain program has and what the console command began with; not what is ignored.
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def end(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _report(error: Exception) -> int:
    """One line for a user's mistake or a lost rank; the traceback only for a fault of ours."""
    from pyparallel.launch import RankError

    if isinstance(error, RankError):
        cause = error.__cause__
        if isinstance(cause, ValueError):
            return _say(str(cause), 2)
        if cause is not None and not isinstance(cause, (OSError, RuntimeError, MemoryError)):
            sys.stderr.write(error.remote_traceback)
        return _say(f"rank {error.rank} of {error.world_size}: {error.reason}", 1)
    if isinstance(error, ValueError):
        return _say(str(error), 2)
    if isinstance(error, OSError):
        place = error.filename
        if place is None:
            full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
            place = "standard output" if full and not _writable() else "the system"
        return _say(f"{os.fsdecode(place)}: {error.strerror or error}", 1)
    if isinstance(error, MemoryError):
        return _say(f"not enough memory: {str(error) or 'an allocation failed'}", 1)
    raise error


def _say(message: str, status: int) -> int:
    say(message)
    return status
