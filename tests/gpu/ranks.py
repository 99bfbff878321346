"""Ranks with a GPU each, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pyparallel.cuda_communicator import NcclCommunicator
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh

several = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs 2 GPUs or more"
)


def world_sizes() -> list[int]:
    """2, and all GPUs of the machine."""
    return sorted({2, max(torch.cuda.device_count(), 2)})


def run_on_gpus(fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list:
    """`fn(communicator, *args)` on `size` ranks, rank r on GPU r; results by rank."""
    return launch(_on_gpu, size, fn, args, timeout_s=timeout_s)


def _on_gpu(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    init_mesh(tp=dist.get_world_size())
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    store = dist.distributed_c10d._get_default_store()
    communicator = NcclCommunicator.create(store, rank, size, "gpu_test", timeout_s=20.0)
    try:
        return fn(communicator, *args)
    finally:
        communicator.close()
