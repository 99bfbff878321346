"""The command line: ``pyparallel generate``, ``train``, ``export``, ``doctor`` and ``kernels``.

Each command is a module of :mod:`pyparallel.commands` with ``add_arguments(parser)`` and ``run(args)``.
Exit status: 0; 1 where ranks failed or a check did not hold; 2 for a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "generate": "answer prompts with a model cut over the ranks of this machine",
    "train": "fine-tune a model on text, cut over the ranks of this machine",
    "export": "write a checkpoint, sharded or GGUF, as one Hugging Face folder",
    "doctor": "what this machine and this build offer",
    "kernels": "compile the Triton kernels ahead of time and show what they take",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="pyparallel", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = import_module(f"pyparallel.commands.{name}")
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    try:
        return import_module(f"pyparallel.commands.{args.command}").run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """One line for a user's mistake or a lost rank; the traceback only for a fault of ours."""
    from pyparallel.launch import RankError

    if isinstance(error, RankError):
        cause = error.__cause__
        if isinstance(cause, ValueError):
            return _say(str(cause), 2)
        if cause is not None and not isinstance(cause, (OSError, RuntimeError)):
            sys.stderr.write(error.remote_traceback)
        return _say(f"rank {error.rank} of {error.world_size}: {error.reason}", 1)
    if isinstance(error, ValueError):
        return _say(str(error), 2)
    raise error


def _say(message: str, status: int) -> int:
    print(f"pyparallel: error: {' '.join(message.split())}", file=sys.stderr)
    return status
