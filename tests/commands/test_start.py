"""A command that starts ranks first starts what they are forked from, beside its own imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pyparallel.launch import launch
from pyparallel.ranks.process import PRELOAD_OF, server, start_early
from pyparallel.ranks.torchrun import VARIABLES

# Stands for the console command, and tells of each program that it starts.
SCRIPT = """
import subprocess
import sys

class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        print("started", self.pid, "torch" in sys.modules, flush=True)

subprocess.Popen = Popen
from pyparallel.cli import main
sys.exit(main())
"""


def run(folder: Path, *words: str, **environment: str) -> tuple[int, list[list[str]], str]:
    """The status of a command, what it told of each program it started, and its errors."""
    (folder / "pyparallel").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, folder / "pyparallel", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    lines = [line.split()[1:] for line in found.stdout.splitlines() if line.startswith("started")]
    return found.returncode, lines, found.stderr


@pytest.mark.parametrize("command", PRELOAD_OF)
def test_ranks_import_while_the_command_does(tmp_path: Path, command: str) -> None:
    needs = {"generate": ["--prompt", "a"], "train": ["--data", "nowhere", "--out", "out"]}[command]
    status, ((pid, has_torch),), told = run(tmp_path, command, "--model", "nowhere", *needs)
    assert (status, has_torch) == (2, "False")
    # A mistake is told in a line, and nothing is left.
    assert told.startswith("pyparallel: error: ") and told.count("\n") == 1
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (("generate", "--help"), {}),
        (("generate", "--model", "nowhere", "--prompt", "a"), dict.fromkeys(VARIABLES, "1")),
    ],
)
def test_who_starts_no_ranks_starts_no_server(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    _, started, _ = run(tmp_path, *words, **environment)
    assert not started


def test_ranks_are_forked_from_what_was_started_early() -> None:
    start_early("generate")
    early = server.process.pid
    start_early("generate")
    assert launch(os.getppid, 1) == [early]
