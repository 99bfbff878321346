"""The Triton kernels, compiled: the tests of tests/kernels on this GPU, and ranks on all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
EPOCHS = 6


def test_the_tests_of_the_interpreter_pass_compiled():
    """In a process of its own, because the choice is made when triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-m", "not slow"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert result.returncode == 0, result.stdout[-4000:]


def symmetric_memory(group, num_bytes: int):
    """Regions of torch's symmetric memory, mapped into every rank, and what kernels need of them."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    from pyparallel.kernels.symmetric import SymmetricMemory

    device = torch.device("cuda", torch.cuda.current_device())
    region = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
    region.zero_()
    handle = symm_mem.rendezvous(region, dist.group.WORLD)
    dist.barrier()
    memory = SymmetricMemory(
        handle.rank, list(handle.buffer_ptrs), num_bytes, device=device, timeout_s=20.0
    )
    return memory, region


def communicate(rank: int, size: int, port: int) -> None:
    import torch.distributed as dist

    from pyparallel.kernels.collectives import all_gather, all_reduce, reduce_scatter
    from pyparallel.kernels.matmul import matmul
    from pyparallel.kernels.matmul_all_reduce import matmul_all_reduce
    from pyparallel.kernels.matmul_reduce_scatter import matmul_reduce_scatter

    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    memory, region = symmetric_memory(dist.group.WORLD, 1 << 26)

    def integers(*shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-3, 4, shape, generator=generator).to(torch.bfloat16).cuda()

    for epoch in range(EPOCHS):
        xs = [integers(96 * size, seed=epoch * 100 + r) for r in range(size)]
        total = torch.stack(xs).float().sum(0).bfloat16()
        for algorithm in ("one_shot", "two_shot"):
            assert torch.equal(all_reduce(xs[rank], memory, algorithm=algorithm), total)
        scattered = reduce_scatter(xs[rank], memory)
        assert torch.equal(scattered, total.chunk(size)[rank])
        assert torch.equal(all_gather(scattered, memory), total)
        a = [integers(64 * size, 128, seed=epoch * 100 + r) for r in range(size)]
        w = [integers(256, 128, seed=epoch * 100 + 50 + r) for r in range(size)]
        whole = sum(matmul(p, q).float() for p, q in zip(a, w, strict=True)).bfloat16()
        assert torch.equal(matmul_all_reduce(a[rank], w[rank], memory), whole)
        part = matmul_reduce_scatter(a[rank], w[rank], memory)
        assert torch.equal(part, whole.chunk(size)[rank])
        torch.cuda.synchronize()
        memory.check("six epochs")
    del region
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs or more")
def test_ranks_on_all_gpus():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = torch.cuda.device_count()
    torch.multiprocessing.spawn(communicate, (size, port), nprocs=size)
