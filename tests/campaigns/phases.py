"""What ranks are doing when a fault comes: each phase is repeated until it does, or for a while."""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.decoding.generate import generate
from pyparallel.launch import report
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.saving.export import export
from pyparallel.saving.save import save
from pyparallel.training.pipeline import Pipeline
from pyparallel.training.pipeline_schedules import schedule_of

PHASES = ("start-up", "load", "prefill", "decode", "train", "save", "export")
# How long a phase goes on where no fault ends it.
WHILE_S = 1.0


def work(
    phase: str, folder: str, place: str, own: dict[int, str], seed: int, while_s: float
) -> str:
    """Report that the phase begins, then repeat it.

    Args:
        folder: of the model.
        place: where checkpoints are written; a good one is at ``place``/good.
        own: faults that a rank does to itself: "cut", "full" or "forked".
    """
    random.seed(seed)
    mesh = init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    model = None
    if phase not in ("start-up", "load", "train"):
        model = load(folder, mesh, dtype=torch.float32)
    once = _phase(phase, folder, place, mesh, model)
    fault = own.get(mesh.world.rank)
    report((os.getpid(), _fork() if fault == "forked" else None))
    deadline = time.monotonic() + while_s
    if fault == "cut":
        threading.Timer(random.random() * 0.1, _cut, [random.Random(seed)]).start()
    if fault == "full":
        # Python ignores the signal: a write beyond it fails, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (random.randrange(1, 20_000),) * 2)
    running = torch.ones(1)
    while True:
        once()
        # The ranks stop together.
        running.fill_(time.monotonic() < deadline)
        mesh.world.communicator.broadcast(running, 0)
        if not running.item():
            return "done"


def _phase(
    phase: str, folder: str, place: str, mesh: Mesh, model: torch.nn.Module | None
) -> Callable[[], object]:
    if phase == "start-up":
        return mesh.world.communicator.barrier
    if phase == "load":
        return lambda: load(open_checkpoint(folder), mesh, dtype=torch.float32)
    if phase in ("prefill", "decode"):
        prompt, new = ([5] * 40, 1) if phase == "prefill" else ([5, 9], 40)
        return lambda: generate(model.eval(), [prompt], max_new_tokens=new)
    if phase == "train":
        order = schedule_of("1f1b").order
        stages = load_stages(open_checkpoint(folder), mesh, chunks=1, order=order)
        stages = [stage.train() for stage in stages]
        pipeline = Pipeline(stages, mesh, num_microbatches=1)
        ids = torch.arange(24).view(2, 12)
        return lambda: pipeline.step(ids, ids)
    if phase == "save":
        return lambda: save(model, Path(place) / "good", mesh, overwrite=True)
    return lambda: export(model, Path(place) / "exported", mesh, overwrite=True)


def _cut(rng: random.Random) -> None:
    """Close a socket or a pipe of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", "pipe:")):
                found.append(int(name))
        except OSError:
            continue
    found = [descriptor for descriptor in found if descriptor > 2]
    if found:
        os.close(rng.choice(sorted(found)))


def _fork() -> int:
    """A process that holds everything this one has open."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid
