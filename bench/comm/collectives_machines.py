"""Collectives between machines against Gloo's: ``python -m bench.comm.collectives_machines``.

The machines are network namespaces on a bridge of this one, with links as fast as the processor and, in
a second table, of 1 Gbit/s each way. All ranks and both ends of every link share this machine's cores:
on the fast links it is the processor time of a byte that is measured. The engines take turns in one run;
medians. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.comm.machines_ranks import ENGINES, Found, Job
from tests.machines.hosts import some_hosts

LAYOUTS = ((2, 2), (1, 3), (2, 1, 3))
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
NUM_BYTES = (1 << 10, 1 << 20, 32 << 20)
SLOW_MEGABITS = 1000
LIMIT_S = 600


def measured(
    ranks: Sequence[int],
    *,
    operations: Sequence[str] = OPERATIONS,
    num_bytes: Sequence[int] = NUM_BYTES,
    engines: Sequence[str] = ENGINES,
    turns: int = 7,
    megabits: int | None = None,
) -> list[Found]:
    """What ``ranks`` of each of so many hosts found.

    Args:
        megabits: what a link carries a second each way; None: as much as the processor.

    Raises:
        PermissionError: this user may not make network namespaces.
    """
    with tempfile.TemporaryDirectory() as folder, some_hosts(len(ranks)) as hosts:
        if megabits is not None:
            hosts.slow(megabits)
        place = Path(folder)
        job = Job(
            list(ranks),
            list(operations),
            list(num_bytes),
            turns,
            list(engines),
            str(place / "found.json"),
        )
        (place / "job.json").write_text(json.dumps(asdict(job)))
        for process in hosts.ranks(1, "bench.comm.machines_ranks", str(place / "job.json")):
            output, _ = process.communicate(timeout=LIMIT_S)
            if process.returncode != 0:
                raise RuntimeError(f"a host's ranks failed: {output.strip()[-500:]}")
        return [Found(**one) for one in json.loads(Path(job.result).read_text())]


def table(ranks: Sequence[int], found: Sequence[Found]) -> str:
    """Medians of both engines in ms and, in brackets, CPU ms of all ranks."""
    name = "+".join(map(str, ranks))
    rows = [f"| {name} | bytes | pyparallel, ms (CPU) | Gloo, ms (CPU) | Gloo / ours |"]
    rows.append("|---|---:|---:|---:|---:|")
    by_key = {(one.operation, one.num_bytes, one.engine): one for one in found}
    for operation in dict.fromkeys(one.operation for one in found):
        for num_bytes in dict.fromkeys(one.num_bytes for one in found):
            ours, gloo = (by_key[operation, num_bytes, engine] for engine in ENGINES)
            medians = [statistics.median(one.seconds) for one in (ours, gloo)]
            cells = [
                f"{1e3 * seconds:.2f} ({1e3 * one.cpu_s:.2f})"
                for seconds, one in zip(medians, (ours, gloo), strict=True)
            ]
            ratio = f"{medians[1] / medians[0]:.2f}"
            rows.append(f"| {operation} | {num_bytes} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write what was found there")
    options = parser.parse_args()
    print(
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )
    kept = []
    for megabits in (None, SLOW_MEGABITS):
        print("\nlinks as fast as the processor" if megabits is None else f"\n{megabits} Mbit/s")
        for ranks in LAYOUTS:
            found = measured(ranks, megabits=megabits)
            print("", table(ranks, found), sep="\n", flush=True)
            kept += [{"ranks": ranks, "megabits": megabits, **asdict(one)} for one in found]
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
