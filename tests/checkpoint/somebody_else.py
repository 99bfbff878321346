"""A program run as another user of the machine: only root can start one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NOBODY = 65534


def is_root() -> bool:
    return os.geteuid() == 0


def as_somebody_else(imports: str, code: str, path: Path) -> list[str]:
    """The lines that ``code`` prints, with ``path`` as its argument, as another user if root asks.

    Args:
        imports: run before the user changes: another one may not read this checkout.
    """
    if is_root():
        imports += f"\nimport os; os.setgroups([]); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
        # pytest's own folders are closed to others.
        for parent in path.parents[1:]:
            mode = parent.stat().st_mode
            if parent.stat().st_uid == 0 and not mode & 1:
                parent.chmod(mode | 0o111)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{imports}\n{code}", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
