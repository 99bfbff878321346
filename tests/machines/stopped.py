"""Ranks that do not answer, of hosts that live: ``python -m tests.machines.stopped FOLDER`` on 2 + 2.

Rank 2, which speaks for its host, keeps the interpreter's lock, then stops itself; the others wait.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.heartbeat import LOST_AFTER_S
from pyparallel.mesh import init_mesh

SILENT_S = LOST_AFTER_S + 3


def keep_the_lock() -> None:
    ctypes.PyDLL(None).sleep(SILENT_S)


def be_stopped() -> None:
    subprocess.Popen(["sh", "-c", f"sleep {SILENT_S}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tp = init_mesh(tp=4).tp
    sums = []
    for silent in (keep_the_lock, be_stopped):
        started = time.monotonic()
        if tp.rank == 2:
            silent()
        sums.append(all_reduce_raw(torch.tensor([tp.rank + 1.0]), tp).item())
        assert time.monotonic() - started > LOST_AFTER_S
    (Path(sys.argv[1]) / str(tp.rank)).write_text(str(sums))
