"""What the ranks of two hosts do: ``python -m tests.machines.job same|cut|kill FOLDER``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.communicator import PeerError
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.mesh import Mesh, init_mesh

# Ranks along the axes: tensor parallel inside a host with data parallel across, and across both.
MESHES = ({"dp": 2, "tp": 2}, {"tp": 4})
TIMEOUT_S = 4.0
# torch's own.
LONG_S = 1800.0


def step(mesh: Mesh, number: int) -> list[Tensor]:
    """Output and gradients of two layers cut over tp, summed over dp."""
    torch.manual_seed(number)
    up = ColumnParallelLinear(9, 14, group=mesh.tp)
    down = RowParallelLinear(14, 5, group=mesh.tp)
    x = torch.randn(4, 9) + mesh.dp.rank
    y = down(torch.nn.functional.gelu(up(x)))
    y.square().sum().backward()
    gradients = [all_reduce_raw(p.grad, mesh.dp) for p in (*up.parameters(), *down.parameters())]
    return [y.detach(), *gradients]


def same() -> list:
    """The results of a step on every mesh, and the engines that its axes talk through."""
    found = []
    for sizes in MESHES:
        mesh = init_mesh(**sizes)
        engines = [type(group.communicator).__name__ for group in (mesh.tp, mesh.dp)]
        found.append([engines, [tensor.tolist() for tensor in step(mesh, 0)]])
    return found


def until_told(folder: Path, timeout_s: float) -> dict:
    """Steps until a rank or the link is gone; what this rank was told then, and when."""
    mesh = init_mesh(dp=2, tp=2, timeout_s=timeout_s)
    (folder / f"process {mesh.world.rank}").write_text(str(os.getpid()))
    for number in range(10_000):
        if number == 20 and mesh.world.rank == 0:
            (folder / "under way").touch()
        try:
            step(mesh, number)
        except PeerError as error:
            return {"error": str(error), "at": time.time(), "process": os.getpid()}
        time.sleep(0.01)
    raise AssertionError("nothing was ever gone")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    limits = {"cut": TIMEOUT_S, "kill": LONG_S}
    result = same() if sys.argv[1] == "same" else until_told(place, limits[sys.argv[1]])
    (place / os.environ["RANK"]).write_text(json.dumps(result))
    if sys.argv[1] != "same":
        raise SystemExit(1)
