"""A process that takes about half of one core in short turns, which makes that core a slower one.

    python -m bench.decoding.busy_core CORE

Turns are far shorter than a layer. A loop that never sleeps takes a core for milliseconds at a time;
ranks that meet twice a layer then all stand still for as long, whatever their shares are, and no cut
could help.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

BUSY_S, IDLE_S = 150e-6, 50e-6


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """Keep ``core`` half busy inside the block."""
    process = subprocess.Popen([sys.executable, "-m", __name__, str(core)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main(core: int) -> None:
    """Until the process that started this one is gone."""
    parent = os.getppid()
    os.sched_setaffinity(0, {core})
    while os.getppid() == parent:
        until = time.perf_counter() + BUSY_S
        while time.perf_counter() < until:
            pass
        # Linux adds some 50 us to it.
        time.sleep(IDLE_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
