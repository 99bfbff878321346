"""Hosts that are set up in odd ways: ``python -m tests.machines.setups FOLDER`` on each of 2 + 1 ranks.

Every case is a job of its own, of forks of these processes; what a rank was told lies in
FOLDER/CASE-RANK.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import torch

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.comm import interfaces, rendezvous
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.layers import ColumnParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.saving.save import restore, save

# Of <sched.h> and <sys/mount.h>.
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000


def mount_over(place: Path, there: Path) -> None:
    """Have this process, and nobody else, see ``there`` at ``place``."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.unshare(CLONE_NEWNS) == 0
    done = done and libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
    done = done and libc.mount(bytes(there), bytes(place), None, MS_BIND, None) == 0
    if not done:
        raise OSError(ctypes.get_errno(), f"can't mount over {place}")


def clones(folder: Path) -> object:
    """Machines that say the same of themselves: they are told apart, and soon."""
    rendezvous.machine_identity = interfaces.network_identity = lambda: "cloned"
    started = time.monotonic()
    tp = init_mesh(tp=3).tp
    seconds = time.monotonic() - started
    total = all_reduce_raw(torch.tensor([tp.rank + 1.0]), tp).item()
    return [
        type(tp.communicator).__name__,
        rendezvous.machines_of(tp.communicator.process_group),
        total,
        seconds,
    ]


def named_loopback(folder: Path) -> object:
    """Debian's line of /etc/hosts, and no interface named."""
    mount_over(Path("/etc/hosts"), folder / "hosts")
    del os.environ["GLOO_SOCKET_IFNAME"]
    started = time.monotonic()
    try:
        init_mesh(tp=3)
    except ValueError as error:
        return [str(error), time.monotonic() - started]
    return ["", 0.0]


def folders(folder: Path) -> object:
    """What each host has at FOLDER/own is its own."""
    (folder / "own").mkdir(exist_ok=True)
    mount_over(folder / "own", folder / f"host-{int(os.environ['RANK']) // 2}")
    mesh = init_mesh(tp=3)
    torch.manual_seed(0)
    model = ColumnParallelLinear.from_dense(torch.nn.Linear(5, 8), group=mesh.tp)
    told = []
    try:
        save(model, folder / "own/saved", mesh)
    except CheckpointError as error:
        told.append(str(error))
    save(model, folder / "own/saved", mesh, extra={"step": 3}, per_host=True)
    try:
        restore(model, folder / "own/saved", mesh)
    except CheckpointError as error:
        told.append(str(error))
    return told


CASES = (clones, named_loopback, folders)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for number, case in enumerate(CASES):
        child = os.fork()
        if child == 0:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
            told = case(place)
            (place / f"{case.__name__}-{os.environ['RANK']}").write_text(json.dumps(told))
            raise SystemExit(0)
        os.waitpid(child, 0)
