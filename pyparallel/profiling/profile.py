"""``pyparallel.profile``: every rank traces, and one file shows all of them, for Perfetto."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from pyparallel.comm.exchange import gather_objects
from pyparallel.profiling.merge import RankTrace, merge
from pyparallel.profiling.named import Call, named

# Of the clocks of two machines; the middle one is taken.
ROUNDS = 9


@contextmanager
def profile(
    path: str | Path, *, record_shapes: bool = False, with_stack: bool = False
) -> Iterator[torch.profiler.profile]:
    """Trace the block on every rank, and write one file for all; called by every rank.

    Open the file at ui.perfetto.dev, or as chrome://tracing. Each rank is a process in it, a GPU another
    one beside its rank. Collectives and the library's ops have their names, backends and bytes. A track
    beside them has each collective in two: **waiting**, until the last rank of the group has come, and
    **moving**, from then on; "collectives" in the file adds them up by rank, operation and group. What a
    fused op says inside its kernel is in the op's own slice, and what a GPU's engine enqueues is not
    split.

    Ranks of one machine have one clock; another machine's is aligned by exchanges at the end, to within
    what a barrier takes. Outside the block nothing is named or noted.

    Args:
        path: of the file, which appears whole, on a file system that all ranks share; compressed where
            its name ends in .gz, which Perfetto opens as well.
        record_shapes, with_stack: as ``torch.profiler.profile`` takes them.

    Yields:
        torch's profiler of this rank.

    Raises:
        OSError: the file can't be written. An error of the block is raised as it is, without a file.
    """
    path = Path(path).absolute()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    tracing = torch.profiler.profile(
        activities=activities, record_shapes=record_shapes, with_stack=with_stack
    )
    with named() as calls, tracing:
        yield tracing
    rank = dist.get_rank() if dist.is_initialized() else 0
    part = _part(path, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    tracing.export_chrome_trace(str(part))
    told = _told(calls)
    if rank == 0:
        traces = []
        for other, (ahead_ns, heard) in enumerate(told):
            place = _part(path, other)
            events = json.loads(place.read_text())
            place.unlink()
            noted = [Call(**call) for call in heard["calls"]]
            traces.append(RankTrace(other, heard["pid"], events, noted, ahead_ns))
        text = json.dumps(merge(traces), separators=(",", ":")).encode()
        part.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        os.replace(part, path)
    if dist.is_initialized():
        # Nobody goes on before the file is there.
        gather_objects(dist.group.WORLD, None)


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.name}.rank-{rank}")


def _told(calls: list[Call]) -> list[tuple[int, dict[str, Any]]]:
    """For each rank: by how many ns its clock is ahead of the first one's; its pid and collectives."""
    own = {"pid": os.getpid(), "calls": [asdict(call) for call in calls]}
    if not dist.is_initialized():
        return [(0, own)]
    world = dist.group.WORLD
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = boot.read_text().strip() if boot.exists() else os.uname().nodename
    seen = []
    for _ in range(ROUNDS):
        gather_objects(world, None)
        seen.append(time.time_ns())
    told = gather_objects(world, {"host": host, "seen": seen, **own})
    return list(zip(clocks_ahead(told), told, strict=True))


def clocks_ahead(told: list[dict[str, Any]]) -> list[int]:
    """By how many ns each rank's clock is ahead of the first one's.

    Args:
        told: of each rank its ``host``, and the times that it has ``seen``, one behind each exchange.
    """
    first_of: dict[str, int] = {}
    for rank, other in enumerate(told):
        first_of.setdefault(other["host"], rank)
    offsets = []
    for other in told:
        # The ranks of one machine have one clock, whatever each of them saw.
        clock = told[first_of[other["host"]]]["seen"]
        ahead = [a - b for a, b in zip(clock, told[0]["seen"], strict=True)]
        offsets.append(int(statistics.median(ahead)))
    return offsets
