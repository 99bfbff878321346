"""Ranks with a GPU each, for the tests of this folder; or several on one GPU.

On a machine with one GPU, NCCL >= 2.30 lets ranks share it where NCCL_MULTI_RANK_GPU_ENABLE=1 says so;
torch's symmetric memory where TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 does. What such a run shows is
correctness: the processes take turns on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh

SHARING = {"NCCL_MULTI_RANK_GPU_ENABLE", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"}
shared = all(os.environ.get(name) == "1" for name in SHARING)
one_gpu = torch.cuda.is_available() and torch.cuda.device_count() < 2

several = pytest.mark.skipif(
    one_gpu and not shared, reason=f"needs 2 GPUs or more, or {', '.join(sorted(SHARING))} = 1"
)


def gpu_of(rank: int) -> int:
    return rank % torch.cuda.device_count()


def world_sizes() -> list[int]:
    """2, and all GPUs of the machine."""
    return sorted({2, max(torch.cuda.device_count(), 2)})


def run_on_gpus(fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list:
    """`fn(communicator, *args)` on `size` ranks, rank r on `gpu_of(r)`; results by rank."""
    return launch(_on_gpu, size, fn, args, timeout_s=timeout_s)


def _on_gpu(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    init_mesh(tp=dist.get_world_size())
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(gpu_of(rank))
    store = dist.distributed_c10d._get_default_store()
    communicator = NcclCommunicator.create(store, rank, size, "gpu_test", timeout_s=20.0)
    try:
        return fn(communicator, *args)
    finally:
        communicator.close()
