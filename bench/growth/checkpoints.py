"""Growth of a checkpoint's planning: 405B and AdamW, cut over all ranks, on meta tensors."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from bench.checkpoint.planning import Played, index_of, planned, restored, with_files
from bench.checkpoint.ranks import Job
from bench.growth.line import Line, median_s

WHERE = "meta tensors, one process plays all ranks"


@cache
def played(ranks: int) -> Played:
    return Played(Job(dp=ranks // 8, pp=1, tp=8, fsdp=True))


def planning(ranks: int) -> float:
    """CPU seconds of rank 0, for each rank whose boxes it is told."""
    job = played(ranks)
    return median_s(lambda: index_of(job, *planned(job))) / ranks


def restoring(ranks: int) -> float:
    """CPU seconds of one rank's look at the index, on the mesh that saved."""
    job = played(ranks)
    with tempfile.TemporaryDirectory() as name:
        folder = with_files(Path(name), index_of(job, *planned(job)), rank=ranks // 2)
        return median_s(lambda: restored(job, folder, ranks // 2))


LINES = (
    Line(
        name="planning a save, of each rank",
        axis="ranks",
        unit="s of CPU",
        sizes=(64, 256, 1024),
        expected=0,
        measure=planning,
        where=WHERE,
    ),
    Line(
        name="a rank's part of an index",
        axis="ranks",
        unit="s of CPU",
        sizes=(64, 256, 1024),
        expected=0,
        measure=restoring,
        where=WHERE,
    ),
)
