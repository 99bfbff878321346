"""``python -m tests.training.lost_peer_script FOLDER``: rank 1 ends, and rank 0 goes on to call it.

What rank 0 is told by each call lies in FOLDER/told.json afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.saving.export import export
from pyparallel.saving.save import restore, save
from pyparallel.training.pipeline import Pipeline
from tests.training.pipeline_checks import batch_of

TIMEOUT_S = 5.0


def main(folder: Path) -> None:
    mesh = init_mesh(tp=2, timeout_s=TIMEOUT_S)
    model = load(folder / "model", mesh)
    pipeline = Pipeline(model, mesh, num_microbatches=2)
    ids, targets = batch_of()
    pipeline.step(ids, targets)
    save(model, folder / "saved", mesh)
    if mesh.tp.rank == 1:
        os._exit(9)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: pipeline.step(ids, targets),
        "evaluate": lambda: pipeline.evaluate(ids, targets),
        "save": lambda: save(model, folder / "again", mesh),
        "restore": lambda: restore(model, folder / "saved", mesh),
        "export": lambda: export(model, folder / "exported", mesh),
        "init_mesh": lambda: init_mesh(tp=2),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = ["returned", "", []]
        except Exception as error:
            missing = list(getattr(error, "missing", ()))
            told[name] = [type(error).__name__, str(error), missing]
    (folder / "told.json").write_text(json.dumps(told))
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
