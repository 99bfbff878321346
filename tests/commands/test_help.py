"""What a help costs, and that what it says without the library is what the library says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pyparallel.cli import COMMANDS
from pyparallel.commands import flags, generate_flags, start, train_flags
from pyparallel.mesh import AXES
from pyparallel.models.decoder import RECOMPUTE
from pyparallel.models.load import WEIGHTS
from pyparallel.training.data import ENGINES
from pyparallel.training.learning_rate import LR_SCHEDULES
from pyparallel.training.pipeline_schedules import SCHEDULES

# Each takes longer to import than a help may take in all.
HEAVY = re.compile(
    r"\| +(torch|numpy|transformers|triton|rich|pyparallel\.(?:comm|ops|layers|models|training))$"
)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_a_help_imports_nothing_that_takes_long(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pyparallel", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: pyparallel"), done.stderr
    imported = [match[1] for line in done.stderr.splitlines() if (match := HEAVY.search(line))]
    assert imported == []


def test_a_warning_of_ours_is_one_line() -> None:
    told = start.format_warning("two\nlines", UserWarning, start.__file__, 3)
    assert told == "pyparallel: warning: two lines\n"
    assert "x.py:3: UserWarning: text" in start.format_warning("text", UserWarning, "x.py", 3)


def test_what_flags_say_is_what_the_library_says() -> None:
    assert flags.AXES == AXES
    assert ("dense", *WEIGHTS) == generate_flags.WEIGHTS
    assert train_flags.RECOMPUTE == RECOMPUTE
    assert train_flags.ENGINES == ENGINES
    assert train_flags.LR_SCHEDULES == LR_SCHEDULES
    assert sorted(SCHEDULES) == list(train_flags.SCHEDULES)
