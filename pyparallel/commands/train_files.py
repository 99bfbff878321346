"""The folder of a training run: its checkpoints, and the trained model.

DIR/step-000100    as pyparallel.save writes it, after 100 steps; each appears whole
DIR/model          as Hugging Face's, at the end
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyparallel.checkpoint.sharded import ShardedCheckpoint, is_sharded
from pyparallel.commands.train_run import Run

MODEL = "model"
_STEP = re.compile(r"step-([0-9]{6,12})")
# What changes the curve, but may be meant: it is said. The rest has to be as it was.
_TOLD = ("steps", "lr", "warmup", "lr_schedule", "max_norm", "seed", "dtype", "autocast")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the checkpoint, and how many steps it has behind it."""

    path: Path
    step: int


def step_folder(out: str | Path, steps: int) -> Path:
    """The checkpoint after so many steps."""
    return Path(out) / f"step-{steps:06}"


def options_of(asked: Run, rows: Tensor, steps: int) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {
        "step": steps,
        "data": hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest(),
        "sequences": asked.batch * asked.accumulate,
        # JSON has no infinity.
        **{name: str(getattr(asked, name)) for name in _TOLD},
    }


def check_out(asked: Run, resume: str | None) -> None:
    """Raise where ``--out`` has another run's files, before anything is read.

    Raises:
        ValueError: it names them.
    """
    if asked.out is None or resume is not None:
        return
    out = Path(asked.out)
    held = [path for path in (out / MODEL, *_checkpoints(out)) if path.exists()]
    if held:
        raise ValueError(
            f"--out: expected a folder without another run's files, but {held[0]} is there; go on with "
            f"--resume, or choose another"
        )


def find_checkpoint(asked: Run, rows: Tensor, resume: str | None) -> Resumed | None:
    """What ``--resume`` names: a checkpoint, or the last one of a run's folder.

    Raises:
        ValueError: there is none, it is no run's of this command, or of other data, or has as many steps
            behind it as are asked for.
        CheckpointError: it can't be read.
    """
    if resume is None:
        return None
    place = Path(resume or asked.out)
    found = [place] if is_sharded(place) else _checkpoints(place)
    if not found and not resume:
        return None
    if not found:
        raise ValueError(f"--resume: expected a checkpoint, or a folder with one, got {place}")
    wanted = options_of(asked, rows, 0)
    told = ShardedCheckpoint(found[-1]).index.state.get("extra", {})
    if not isinstance(told.get("step"), int) or not wanted.keys() <= told.keys():
        raise ValueError(
            f"--resume: expected a checkpoint of pyparallel train, got {found[-1]}; start from its "
            f"weights with --model"
        )
    for name in ("data", "sequences"):
        if told[name] != wanted[name]:
            raise ValueError(
                f"--resume: expected the run's own --text, --length, --sequences, --batch and "
                f"--accumulate, got others than {found[-1]} has; give those, or start from its weights "
                f"with --model"
            )
    if told["step"] >= asked.steps:
        raise ValueError(
            f"--steps: expected more than the {told['step']} that {found[-1]} has behind it, got "
            f"{asked.steps}"
        )
    for name in _TOLD:
        if told[name] != wanted[name]:
            flag = name.replace("_", "-")
            line = f"--resume: --{flag} was {told[name]}, and is {wanted[name]} from here on"
            print(line, file=sys.stderr, flush=True)
    return Resumed(found[-1], told["step"])


def _checkpoints(out: Path) -> list[Path]:
    """Those of a run, the first one first."""
    paths = [path for path in out.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted((path for path in paths if is_sharded(path)), key=lambda path: int(path.name[5:]))
