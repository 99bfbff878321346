"""What ``pyparallel train`` asks of its ranks, and the data of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel.cut.shares import Shares


@dataclass(frozen=True)
class Run:
    """What to train, and how; the same for every rank.

    Attributes:
        sizes: ranks along the axes of the mesh.
        steps: in all, from the first one's on.
        batch: sequences at once, over all of dp.
        shares: of the tp ranks; None: equal.
        micro_batches: parts that a replica's batch is cut into.
        chunks: pipeline stages a rank.
        max_norm: gradients are scaled down to it; inf: never.
        accumulate: batches a step.
        warmup, lr_schedule: as :func:`pyparallel.training.learning_rate.learning_rate` takes them.
        seed: of step s's random numbers is ``seed + s``, on every rank.
        autocast: the dtype of matmuls; None: the weights'.
        out: the folder of checkpoints and of the trained model.
        save_every, eval_every: steps; None: never.
        profile: the file of a trace of the steps behind the first one.
    """

    sizes: dict[str, int]
    steps: int
    batch: int
    lr: float
    dtype: str = "float32"
    sequence_parallel: bool = False
    recompute: str = "none"
    engine: str = "ddp"
    schedule: str = "1f1b"
    chunks: int = 1
    micro_batches: int = 1
    max_norm: float = 1.0
    shares: Shares | None = None
    accumulate: int = 1
    warmup: int = 0
    lr_schedule: str = "constant"
    seed: int = 0
    autocast: str | None = None
    out: str | None = None
    save_every: int | None = None
    eval_every: int | None = None
    profile: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())


def batch_of(rows: Tensor, step: int, batch: int) -> Tensor:
    """The sequences of a step: the next ones, from the start again after the last."""
    return rows[(torch.arange(batch) + step * batch) % rows.shape[0]]
