"""The first things of the console command, before anything else of the library is imported.

A program that merely imports the library is left as it is.
"""

from __future__ import annotations

import itertools
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType


def is_command() -> bool:
    """Whether this process is ``pyparallel ...`` or ``python -m pyparallel ...``."""
    arguments = sys.orig_argv
    if sys.argv[:1] == ["-m"]:
        return any(
            first == "-m" and second in ("pyparallel", "pyparallel.__main__")
            for first, second in itertools.pairwise(arguments)
        )
    # What multiprocessing spawns for a command has the command's sys.argv, but was not started by it.
    script = sys.argv[0] if sys.argv else ""
    return os.path.basename(script) == "pyparallel" and script in arguments


def only_tells() -> bool:
    """Whether this command ends with a help or a version: nothing that takes long is imported then."""
    return is_command() and (
        len(sys.argv) == 1 or any(word in ("-h", "--help", "--version") for word in sys.argv[1:])
    )


def leave_the_current_folder_out() -> None:
    """Take it from the path of imports, wherever ``python -m`` or a variable put it."""
    try:
        here = os.getcwd()
    except OSError:
        # It was deleted. Libraries that ask where they are would fail, and no name in it leads anywhere.
        os.chdir("/")
        here = ""
    home = os.path.abspath(os.path.join(__file__, "../../..")) if here else ""
    # Where the library itself is in the current folder it has to stay, behind everything else.
    kept = [entry for entry in sys.path if entry and os.path.normpath(entry) != here]
    if here and here == home:
        kept.append(here)
    sys.path[:] = kept
    # Nor is it on the path of Python's own helpers, which multiprocessing starts with `-c`.
    os.environ.setdefault("PYTHONSAFEPATH", "1")


# Before the next import: `signal` imports modules that a file there could stand for.
if is_command():
    leave_the_current_folder_out()

import signal  # noqa: E402
import warnings  # noqa: E402

_format_warning = warnings.formatwarning
# The commands that start ranks.
_WITH_RANKS = ("generate", "train")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def begin() -> None:
    """Have the three standard streams, tell in one line what ends the command early, and start what the
    ranks are forked from, which imports torch as long as this process does.
    """
    _fill_standard_streams()
    sys.excepthook = _one_line
    warnings.formatwarning = format_warning
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What a parent told to be ignored (nohup) stays ignored.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)
    if sys.argv[1:2] and sys.argv[1] in _WITH_RANKS and not only_tells():
        from pyparallel.ranks.process import start_early
        from pyparallel.ranks.torchrun import VARIABLES

        # Under torchrun there are ranks.
        if any(name not in os.environ for name in VARIABLES):
            start_early(sys.argv[1])


def say(message: str) -> None:
    """One line on standard error, if anybody can hear."""
    try:
        sys.stderr.write(f"pyparallel: error: {' '.join(message.split())}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        drop(2)


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """One line for what this library warns of; where in it is nothing to a command's user."""
    if filename.startswith(_PACKAGE):
        return f"pyparallel: warning: {' '.join(str(message).split())}\n"
    return _format_warning(message, category, filename, lineno, line)


def drop(descriptor: int) -> None:
    """Have what is still written there go nowhere, so that nothing fails at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _fill_standard_streams() -> None:
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
        os.set_inheritable(descriptor, True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))


def _end(number: int, frame: FrameType | None) -> None:
    # Imports are under way, of the module that starts the ranks' server too.
    end_server = getattr(sys.modules.get("pyparallel.ranks.process"), "end_server", None)
    if end_server is not None:
        end_server()
    say(f"ended by {signal.Signals(number).name}")
    os._exit(128 + number)


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, (OSError, MemoryError, ImportError)):
        say(f"{kind.__name__}: {error}")
    else:
        sys.__excepthook__(kind, error, trace)
