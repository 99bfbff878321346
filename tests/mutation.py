"""Code broken on purpose, one place at a time, in a copy of the tree: each break must be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("bench", "kernels", "pyparallel", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """``new`` in the place of a file's first ``old``; ``tests``: pytest's arguments, which must fail."""

    path: str
    old: str
    new: str
    tests: str


def run_mutants(mutants: Iterable[Mutant], chosen: list[str]) -> int:
    """Tries all, or those whose file's name (without .py) is in ``chosen``; how many went unnoticed.

    Each line printed says what was replaced and whether a test noticed. A mutant whose text is gone
    changes nothing, and counts as not noticed.
    """
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, tree / part)
        # In a checkout the package is mapped there by its editable install; a copy has none.
        (tree / "pyparallel" / "kernels").symlink_to(tree / "kernels")
        for mutant in mutants:
            path = tree / mutant.path
            if chosen and path.stem not in chosen:
                continue
            whole = path.read_text()
            broken = whole.replace(mutant.old, mutant.new, 1)
            verdict = "changes nothing"
            if broken != whole:
                path.write_text(broken)
                verdict = "NOT noticed" if _passes(tree, mutant.tests) else "noticed"
                path.write_text(whole)
            missed += verdict != "noticed"
            print(f"{mutant.path}: {mutant.old} -> {mutant.new}: {verdict}", flush=True)
    return missed


def _passes(tree: Path, tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )
    # 1: tests failed. Anything else is no verdict.
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0
