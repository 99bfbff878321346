"""The fused sums over CPU ranks against the plain path, by rows, in microseconds.

    pytest -s --benchmark-enable bench/comm/linear_all_reduce.py

Two ranks of one thread, the row-parallel layers of SmolLM2-135M and of a model of 4096 features. Both
paths take turns, and have shown the same bits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.rivals import machine, print_table
from pyparallel import backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.ops.cpu import _few_rows, all_reduce_residual_rms_norm, linear_all_reduce
from pyparallel.ops.row_parallel_linear import linear_then_all_reduce

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# (K_r, N)
SHAPES = {"SmolLM2 out": (288, 576), "SmolLM2 down": (768, 576), "4096 features": (2048, 4096)}
ROUNDS, CALLS = 15, 20


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Of one call, the mean of CALLS, for each of ROUNDS turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            if turn:
                taken[name].append((time.perf_counter() - started) / CALLS)
    return taken


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: Group
) -> torch.Tensor:
    """The plain path: all-reduce in place, addition, norm."""
    return backend.call("rms_norm", residual + all_reduce_raw(x, group), weight, eps)


@torch.inference_mode()
def on_ranks(dtype: torch.dtype) -> dict[tuple, dict[str, list[float]]]:
    group = init_mesh(tp=2).tp
    _few_rows.MOST_ROWS = max(ROWS)
    found = {}
    for shape, (K, N) in SHAPES.items():
        for M in ROWS:
            x, weight = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
            residual, gain = torch.randn(M, N, dtype=dtype), torch.randn(N, dtype=dtype)
            if linear_all_reduce.reason(x, weight, None, group) is not None:
                continue
            y = linear_then_all_reduce(x, weight, None, group)
            assert torch.equal(linear_all_reduce.run(x, weight, None, group), y)
            linear = (x, weight, None, group)
            # Zeros, since the plain path sums in place, again and again.
            summed = (torch.zeros(M, N, dtype=dtype), residual, gain, 1e-5, group)
            calls = {
                "linear": partial(linear_then_all_reduce, *linear),
                "linear fused": partial(linear_all_reduce.run, *linear),
                "norm": partial(add_and_norm, *summed),
                "norm fused": partial(all_reduce_residual_rms_norm.run, *summed),
            }
            found[shape, M] = seconds(calls)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_rows(benchmark: Any, dtype: str) -> None:
    found = launch(on_ranks, 2, getattr(torch, dtype), threads=1)[0]
    rows = []
    for (shape, M), taken in found.items():
        us = {name: 1e6 * statistics.median(times) for name, times in taken.items()}
        linear, ours, norm_us, ours_norm = us.values()
        rows.append([f"{shape}, {M} rows", f"{linear:.1f}", f"{ours:.1f}", f"{linear / ours:.2f}"])
        rows[-1] += [f"{norm_us:.1f}", f"{ours_norm:.1f}", f"{norm_us / ours_norm:.2f}"]
    columns = ["", "linear, us", "fused", "x", "sum, residual, norm, us", "fused", "x"]
    print_table(f"row-parallel layers on 2 ranks, {dtype}", columns, rows)
    first = found["SmolLM2 down", 1]["linear fused"]
    benchmark.extra_info |= machine() | {
        "op": "linear_all_reduce",
        "dtype": dtype,
        "world": 2,
        "backend": "cpu",
        "seconds": {f"{shape}, {M}": taken for (shape, M), taken in found.items()},
    }
    turns = iter(first)
    benchmark.pedantic(lambda: time.sleep(next(turns)), rounds=ROUNDS)
