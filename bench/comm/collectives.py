"""The collectives of CPU ranks: this engine against Gloo and, where installed, Intel MPI.

    pytest bench/comm/collectives.py --benchmark-enable          (or: make bench-collectives)

Called from Python, fp32, in place where the operation allows; ``bytes`` is the whole tensor that is
reduced, gathered or scattered. All engines are measured in one run, in turns, on pinned ranks; every
result is checked before it is timed. The limit is the time all ranks need at once to push the bytes
through a buffer in the cache and back (copy, then add), with no communication at all.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.comm.collectives_ranks import BLOCKS, OPERATIONS, block, calls_for, pin
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.launch import launch

KIB, MIB = 1 << 10, 1 << 20
SIZES = {
    2: (KIB, 8 * KIB, 64 * KIB, MIB, 16 * MIB),
    3: (KIB, 8 * KIB, 64 * KIB, MIB),
    4: (KIB, 8 * KIB, 64 * KIB, MIB),
    8: (KIB, 8 * KIB, 64 * KIB, MIB),
}
SLICE = 256 * KIB // 4
# Turns in which the engines alternate.
ROUNDS = 2

Samples = dict[tuple[str, str, int], list[float]]


def _calls(comm: SharedMemoryCommunicator, num_bytes: int) -> dict[tuple[str, str], Callable]:
    """Every operation of both engines on zeros, checked once on numbers."""
    size, rank = comm.size, comm.rank
    x = torch.full((num_bytes // 4,), float(rank))
    whole = torch.zeros(num_bytes // 4 // size * size)
    part = torch.full((num_bytes // 4 // size,), float(rank))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls = {
        ("pyparallel", "all_reduce"): lambda: comm.all_reduce(x),
        ("gloo", "all_reduce"): lambda: dist.all_reduce(x),
        ("pyparallel", "all_gather"): lambda: comm.all_gather(whole, part),
        ("gloo", "all_gather"): lambda: gather(whole, part),
        ("pyparallel", "reduce_scatter"): lambda: comm.reduce_scatter(part, whole),
        ("gloo", "reduce_scatter"): lambda: scatter(part, whole),
    }
    for (engine, operation), call in calls.items():
        x.fill_(rank)
        part.fill_(rank)
        if operation == "reduce_scatter":
            whole.fill_(1)
        call()
        total = sum(range(size))
        expected: Tensor | float = {"all_reduce": total, "reduce_scatter": size}.get(operation, 0)
        result = {"all_reduce": x, "all_gather": whole, "reduce_scatter": part}[operation]
        if operation == "all_gather":
            expected = torch.arange(float(size)).repeat_interleave(part.numel())
        assert (result == expected).all(), (engine, operation, num_bytes)
    # Zeros stay zeros, however often they are summed.
    for tensor in (x, whole, part):
        tensor.zero_()
    return calls


def _limit(num_bytes: int) -> Callable[[], None]:
    pieces = torch.zeros(num_bytes // 4).split(SLICE)
    buffer = torch.zeros(SLICE)
    buffers = [buffer[: piece.numel()] for piece in pieces]

    def passes() -> None:
        for piece, hot in zip(pieces, buffers, strict=True):
            hot.copy_(piece)
            piece.add_(hot)

    return passes


def _rank(sizes: tuple[int, ...]) -> Samples:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "bench")
    pin(comm.rank)
    samples: Samples = {}
    for num_bytes in sizes:
        calls = _calls(comm, num_bytes)
        calls["limit", "all_reduce"] = _limit(num_bytes)
        for (engine, operation), call in calls.items():
            comm.barrier()
            first = torch.tensor([block(call, 3 if num_bytes < MIB else 1)])
            comm.broadcast(first, 0)
            repeats = calls_for(first.item())
            times = samples.setdefault((engine, operation, num_bytes), [])
            for _ in range(BLOCKS):
                if engine == "limit":
                    comm.barrier()
                times.append(block(call, repeats))
    comm.close()
    return samples


def _intel_mpi(size: int) -> Samples:
    """Intel MPI's samples, or none where it is not installed."""
    mpiexec = shutil.which(
        "mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if mpiexec is None:
        return {}
    command = [mpiexec, "-n", str(size), sys.executable, "-m", "bench.comm.collectives_ranks"]
    ended = subprocess.run(
        [*command, *map(str, SIZES[size])], capture_output=True, text=True, timeout=300
    )
    if ended.returncode != 0:
        raise RuntimeError(f"Intel MPI's ranks failed: {ended.stderr.strip()[-500:]}")
    return {
        ("intel_mpi", operation, int(num_bytes)): times
        for operation, by_size in json.loads(ended.stdout).items()
        for num_bytes, times in by_size.items()
    }


@pytest.fixture(scope="session")
def measured() -> Callable[[int], Samples]:
    """All samples at a world size, measured once, the engines in turns."""
    known: dict[int, Samples] = {}

    def at(size: int) -> Samples:
        if size not in known:
            samples: Samples = {}
            for _ in range(ROUNDS):
                turns = [launch(_rank, size, SIZES[size], threads=1)[0]]
                if size <= len(os.sched_getaffinity(0)):
                    turns.append(_intel_mpi(size))
                for turn in turns:
                    for key, times in turn.items():
                        samples.setdefault(key, []).extend(times)
            known[size] = samples
            print(table(size, samples))
        return known[size]

    return at


class _Replay:
    """A clock that samples measured elsewhere move on: pytest-benchmark's statistics of them."""

    now = 0.0

    def __call__(self) -> float:
        return _Replay.now


CASES = [
    (size, num_bytes, operation, engine)
    for size, sizes in SIZES.items()
    for num_bytes in sizes
    for operation in OPERATIONS
    for engine in ("pyparallel", "gloo", "intel_mpi")
    if engine != "intel_mpi" or size == 2
]


@pytest.mark.benchmark(timer=_Replay(), warmup=False, disable_gc=False)
@pytest.mark.parametrize(("size", "num_bytes", "operation", "engine"), CASES)
def test_collective(
    benchmark: pytest.FixtureRequest,
    measured: Callable[[int], Samples],
    size: int,
    num_bytes: int,
    operation: str,
    engine: str,
) -> None:
    samples = measured(size)
    if (engine, operation, num_bytes) not in samples:
        pytest.skip("Intel MPI is not installed: pip install impi-rt mpi4py")
    times = samples[engine, operation, num_bytes]
    benchmark.group = f"{operation}, {size} ranks, {num_bytes} bytes"
    benchmark.extra_info.update(
        op=operation, bytes=num_bytes, dtype="float32", world=size, backend=engine
    )
    if engine == "pyparallel" and operation == "all_reduce":
        benchmark.extra_info["limit_s"] = statistics.median(samples["limit", operation, num_bytes])
    remaining = iter(times)

    def replay() -> None:
        _Replay.now += next(remaining)

    benchmark.pedantic(replay, rounds=len(times), iterations=1)


def table(size: int, samples: Samples) -> str:
    """Medians in microseconds, ours with quartiles, and ratios to the rivals: of medians, of minima.

    On a machine that others use too, the minima tell what the engines do, the medians what they got.
    """
    lines = [
        "",
        f"{size} ranks on {len(os.sched_getaffinity(0))} cores of {_processor()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}",
        f"{'':27}{'pyparallel':>12}{'quartiles':>20}{'Intel MPI':>12}{'Gloo':>12}"
        f"{'Intel /':>9}{'minima':>9}{'Gloo /':>9}{'minima':>9}{'limit':>11}{'of it':>7}",
    ]
    for operation in OPERATIONS:
        for num_bytes in SIZES[size]:

            def median(engine: str, key: tuple = (operation, num_bytes)) -> float | None:
                times = samples.get((engine, *key))
                return statistics.median(times) * 1e6 if times else None

            ours = median("pyparallel")
            low, _, high = statistics.quantiles(samples["pyparallel", operation, num_bytes])
            intel, gloo, limit = median("intel_mpi"), median("gloo"), median("limit")
            least = {
                engine: min(samples[engine, operation, num_bytes])
                for engine in ("pyparallel", "intel_mpi", "gloo")
                if (engine, operation, num_bytes) in samples
            }
            line = f"{operation:<15}{num_bytes:>9} B  {ours:>10.2f}us"
            line += f"{f'{low * 1e6:.2f} .. {high * 1e6:.2f}':>20}"
            if intel:
                line += f"{intel:>10.2f}us{gloo:>10.1f}us{intel / ours:>8.2f}x"
                line += f"{least['intel_mpi'] / least['pyparallel']:>8.2f}x"
            else:
                line += f"{'-':>12}{gloo:>10.1f}us{'-':>9}{'-':>9}"
            line += f"{gloo / ours:>8.1f}x{least['gloo'] / least['pyparallel']:>8.1f}x"
            if limit:
                line += f"{limit:>9.1f}us{100 * limit / ours:>6.0f}%"
            lines.append(line)
    return "\n".join(lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
