"""Ranks that wait while a host is lost: ``python -m tests.machines.lost FOLDER [CASE...]`` on each of 4.

Every case is a job of its own, of forks of these processes. The ranks of one host wait in a call that
those of the other never make; what they are told, and when, lies in FOLDER/CASE-RANK. Afterwards they
linger, so that nobody hears of the loss by their end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.communicator import PeerError
from pyparallel.layers import ColumnParallelLinear
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.saving.save import save
from pyparallel.training.pipeline import Pipeline

TIMEOUT_S = 1800.0
Call = Callable[[], object]


def all_reduce(folder: Path) -> Call:
    tp = init_mesh(tp=4, timeout_s=TIMEOUT_S).tp
    return lambda: all_reduce_raw(torch.ones(5), tp)


def neighbour(folder: Path) -> Call:
    """The second rank waits for the first, in shared memory, and only that one for the other host."""
    mesh = init_mesh(dp=2, tp=2, timeout_s=TIMEOUT_S)
    return lambda: all_reduce_raw(torch.ones(5), mesh.dp if mesh.tp.rank == 0 else mesh.tp)


def pipeline(folder: Path) -> Call:
    mesh = init_mesh(pp=2, tp=2, timeout_s=TIMEOUT_S)
    stages = Pipeline(load(folder / "model", mesh), mesh, num_microbatches=2)
    ids = torch.arange(2, 12).view(2, 5)
    stages.step(ids, ids)
    return lambda: stages.step(ids, ids)


def saving(folder: Path) -> Call:
    mesh: Mesh = init_mesh(tp=4, timeout_s=TIMEOUT_S)
    model = ColumnParallelLinear(8, 8, group=mesh.tp)
    return lambda: save(model, folder / "saved", mesh)


# Which host's ranks wait; the store of all is on host 0.
CASES = {
    "all_reduce": (all_reduce, 0),
    "all_reduce without the store": (all_reduce, 1),
    "neighbour": (neighbour, 0),
    "pipeline": (pipeline, 1),
    "save": (saving, 0),
}


def run(case: str, number: int, folder: Path) -> None:
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
    rank = int(os.environ["RANK"])
    prepare, waits = CASES[case]
    call = prepare(folder)
    told = {"error": "", "at": 0.0}
    (folder / f"{case}-{rank}-waits").touch()
    if rank // 2 != waits:
        time.sleep(1000)
    try:
        call()
    except PeerError as error:
        told = {"error": str(error), "at": time.time()}
    (folder / "writing").mkdir(exist_ok=True)
    (folder / "writing" / f"{case}-{rank}").write_text(json.dumps(told))
    (folder / "writing" / f"{case}-{rank}").rename(folder / f"{case}-{rank}")
    time.sleep(1000)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, case in enumerate(sys.argv[2:] or CASES):
        if os.fork() == 0:
            run(case, number, Path(sys.argv[1]))
    os.wait()
