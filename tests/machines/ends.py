"""Scripts that just end: ``python -m tests.machines.ends FOLDER`` on each rank.

Each operation is the last one of a script of its own, a fork of this process, since only what is still
under way at the end of a script can be lost.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyparallel.comm.collectives import all_reduce_raw, reduce_scatter_raw
from pyparallel.comm.group import Group
from pyparallel.mesh import init_mesh

# More than the kernel's buffers take from a sender at once; divisible by four ranks.
NUMEL = 2 << 20


def all_reduce(mine: Tensor, tp: Group) -> bool:
    return bool((all_reduce_raw(mine, tp) == 10).all())


def reduce_scatter(mine: Tensor, tp: Group) -> bool:
    return bool((reduce_scatter_raw(mine, tp) == 10).all())


def broadcast(mine: Tensor, tp: Group) -> bool:
    tp.communicator.broadcast(mine, 0)
    return bool((mine == 1).all())


def send(mine: Tensor, tp: Group) -> bool:
    if tp.rank == 0:
        tp.communicator.send(mine, 3)
    if tp.rank == 3:
        tp.communicator.recv(mine, 0)
        return bool((mine == 1).all())
    return True


LAST: tuple[Callable[[Tensor, Group], bool], ...] = (all_reduce, reduce_scatter, broadcast, send)


def script(number: int) -> None:
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
    tp = init_mesh(tp=4).tp
    right = LAST[number](torch.full((NUMEL,), tp.rank + 1.0), tp)
    if not right:
        raise AssertionError(f"{LAST[number].__name__}: wrong values on rank {tp.rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, operation in enumerate(LAST):
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            # As a script ends, by the interpreter's own way.
            script(number)
            raise SystemExit(0)
        _, status = os.waitpid(child, 0)
        took = time.monotonic() - started
        told = f"{os.waitstatus_to_exitcode(status)} {took:.2f}"
        (Path(sys.argv[1]) / f"{operation.__name__}-{os.environ['RANK']}").write_text(told)
