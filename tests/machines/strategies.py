"""A training step by every strategy: ``python -m tests.machines.strategies FOLDER`` on 3 or 4 ranks.

FOLDER/model is the dense model, FOLDER/truth what a step of it gives; FOLDER/RANK has the losses.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import torch

from tests.training.test_mesh_training import Case, check

# dp, pp, cp, tp; and sp, which is the tp axis's. The batch does not divide by dp=4.
CASES = {
    3: [
        Case((3, 1, 1, 1), "gpipe", 1, "ddp", False, "none"),
        Case((1, 3, 1, 1), "1f1b", 1, "ddp", False, "none"),
        Case((1, 1, 3, 1), "gpipe", 1, "ddp", False, "none"),
        Case((1, 1, 1, 3), "gpipe", 1, "ddp", False, "none"),
        Case((1, 1, 1, 3), "gpipe", 1, "ddp", True, "none"),
    ],
    4: [
        Case((1, 4, 1, 1), "1f1b", 1, "ddp", False, "none"),
        Case((1, 1, 4, 1), "gpipe", 1, "ddp", False, "none"),
        Case((1, 1, 1, 4), "gpipe", 1, "ddp", False, "none"),
        Case((1, 1, 1, 4), "gpipe", 1, "ddp", True, "none"),
        Case((2, 1, 1, 2), "gpipe", 1, "fsdp", True, "none"),
        Case((1, 2, 2, 1), "1f1b", 1, "ddp", False, "none"),
    ],
}


def steps(folder: Path, world: int) -> list[float]:
    """The loss of a step by each strategy; gradients, norm and next weights are checked here."""
    truth = pickle.loads((folder / "truth").read_bytes())
    losses = [check(case, str(folder / "model"), truth).item() for case in CASES[world]]
    assert all(abs(loss - truth.loss) <= 1e-6 * truth.loss for loss in losses), (losses, truth.loss)
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    found = steps(place, int(os.environ["WORLD_SIZE"]))
    (place / os.environ["RANK"]).write_text(json.dumps(found))
