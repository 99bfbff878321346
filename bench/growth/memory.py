"""Growth of the memory of ranks that share a machine: what none shares with another."""

from __future__ import annotations

import gc
import statistics
import warnings
from pathlib import Path

from bench.growth.line import Line
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh


def own_bytes(ranks: int) -> float:
    """Bytes of its own of a rank that has met the others, and whose collector has run."""
    with warnings.catch_warnings():
        # More ranks than cores is what is measured.
        warnings.simplefilter("ignore")
        return statistics.median(launch(met, ranks, ranks, threads=1))


def met(ranks: int) -> int:
    import torch

    mesh = init_mesh(tp=ranks)
    gc.collect()
    total = all_reduce_raw(torch.ones(1), mesh.tp)
    assert total.item() == ranks
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


LINES = (
    Line(
        name="memory of its own of each rank",
        axis="ranks",
        unit="bytes",
        sizes=(2, 4, 8, 16),
        expected=0,
        measure=own_bytes,
    ),
)
