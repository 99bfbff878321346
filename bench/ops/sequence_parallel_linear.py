"""all_gather_linear and linear_reduce_scatter of CPU ranks: in place in shared memory, and plain.

    pytest bench/ops/sequence_parallel_linear.py --benchmark-enable

The plain path gathers (or multiplies) everything and then multiplies (or scatters); the other reads
peers' tokens in place and waits only after it has multiplied what needs nobody. Both give the same bits,
which is checked first. They alternate in one run on ranks of one thread each; a sample is the slowest
rank's time of one call.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyparallel.comm.sequence import sequence_sizes
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.ops.all_gather_linear import gather_then_linear
from pyparallel.ops.cpu.all_gather_linear import run as all_gather_linear
from pyparallel.ops.cpu.linear_reduce_scatter import run as linear_reduce_scatter
from pyparallel.ops.linear_reduce_scatter import linear_then_reduce_scatter

# (S, H, F): a SmolLM2-135M layer's column and row matmuls, and larger ones; B is 1.
SHAPES = ((128, 576, 1536), (1024, 576, 1536), (1024, 2048, 2048))
ROUNDS = 15

Samples = dict[tuple[str, str], list[float]]


def _time(call: Callable[[], Tensor], barrier: Callable[[], None]) -> float:
    barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rank_samples(shape: tuple[int, int, int], dtype: torch.dtype) -> Samples:
    """Seconds of every round on this rank, by op and path."""
    group = init_mesh(tp=torch.distributed.get_world_size()).tp
    length, hidden, features = shape
    sizes = sequence_sizes(length, group)
    torch.manual_seed(group.rank)
    own = torch.randn(1, sizes[group.rank], hidden).to(dtype)
    up = torch.randn(features // group.size, hidden).to(dtype)
    wide = torch.randn(1, length, features // group.size).to(dtype)
    down = torch.randn(hidden, features // group.size).to(dtype)
    calls = {
        ("all_gather_linear", "plain"): lambda: gather_then_linear(own, up, None, group, sizes),
        ("all_gather_linear", "in place"): lambda: all_gather_linear(own, up, None, group, sizes),
        ("linear_reduce_scatter", "plain"): lambda: linear_then_reduce_scatter(
            wide, down, None, group, sizes
        ),
        ("linear_reduce_scatter", "in place"): lambda: linear_reduce_scatter(
            wide, down, None, group, sizes
        ),
    }
    for op in ("all_gather_linear", "linear_reduce_scatter"):
        assert torch.equal(calls[op, "plain"](), calls[op, "in place"]()), op
    samples: Samples = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            samples[key].append(_time(call, group.communicator.barrier))
    return samples


_measured: dict[tuple, Samples] = {}


def _samples(ranks: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Samples:
    key = (ranks, shape, dtype)
    if key not in _measured:
        by_rank = launch(rank_samples, ranks, shape, dtype, threads=1)
        _measured[key] = {
            name: [max(times) for times in zip(*(each[name] for each in by_rank), strict=True)]
            for name in by_rank[0]
        }
    return _measured[key]


@pytest.mark.parametrize("path", ["plain", "in place"])
@pytest.mark.parametrize("op", ["all_gather_linear", "linear_reduce_scatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sequence_parallel_linear(benchmark, shape, dtype, op, path) -> None:
    times = iter(samples := _samples(2, shape, dtype)[op, path])
    benchmark.group = f"{op}, S={shape[0]} H={shape[1]} F={shape[2]}, {dtype}"
    benchmark.extra_info |= {
        "op": op,
        "shape": list(shape),
        "dtype": str(dtype),
        "world": 2,
        "backend": path,
        "median_s": statistics.median(samples),
        "min_s": min(samples),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    # The ranks have taken the times; pytest-benchmark replays them.
    benchmark.pedantic(lambda: time.sleep(next(times)), rounds=ROUNDS)
