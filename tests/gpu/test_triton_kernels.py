"""The Triton kernels, compiled: the tests of tests/kernels on this GPU, and ranks on all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import gpu_of, several

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
EPOCHS = 6


def test_the_tests_of_the_interpreter_pass_compiled():
    """In a process of its own, because the choice is made when triton is imported."""
    # Most of the time goes to the compiler; pytest-xdist shares that out where it is installed.
    several_workers = ["-n", str(os.cpu_count())] if find_spec("xdist") else []
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *several_workers, "tests/kernels", "-m", "not slow"],
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

    from pyparallel.kernels.collective.symmetric import SymmetricMemory

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

    from pyparallel.kernels.collective.all_gather_matmul import all_gather_matmul
    from pyparallel.kernels.collective.all_reduce_residual_rms_norm import (
        all_reduce_residual_rms_norm,
    )
    from pyparallel.kernels.collective.collectives import all_gather, all_reduce, reduce_scatter
    from pyparallel.kernels.collective.matmul_all_reduce import matmul_all_reduce
    from pyparallel.kernels.collective.matmul_reduce_scatter import matmul_reduce_scatter
    from pyparallel.kernels.matmul.matmul import matmul
    from pyparallel.kernels.norm.norm import rms_norm

    torch.cuda.set_device(gpu_of(rank))
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
        out, gathered = all_gather_matmul(a[rank], w[rank], memory)
        assert torch.equal(gathered, torch.cat(a))
        assert torch.equal(out, matmul(gathered, w[rank]))
        weight = integers(256, seed=epoch)
        for algorithm in ("one_shot", "two_shot"):
            out, h = all_reduce_residual_rms_norm(
                matmul(a[rank], w[rank]),
                torch.ones_like(whole),
                weight,
                memory,
                eps=1e-5,
                algorithm=algorithm,
            )
            expected = rms_norm(whole, weight, eps=1e-5, residual=torch.ones_like(whole))
            assert torch.equal(h, expected.h) and torch.equal(out, expected.out)
        torch.cuda.synchronize()
        memory.check("six epochs")
    del region
    dist.destroy_process_group()


def through_the_table(rank: int, size: int, port: int, folder: str, expected: dict) -> None:
    """What tests/kernels does over shared memory, over GPUs: every op, and a whole model."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(gpu_of(rank))}
    # Ranks that share a GPU: to init_mesh each is alone on a machine, and so takes it.
    local = str(min(size, torch.cuda.device_count()))
    os.environ |= {"LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import test_parallel_ops
    import test_whole_model

    from pyparallel.mesh import init_mesh

    torch.cuda.set_device(gpu_of(rank))
    device = f"cuda:{gpu_of(rank)}"
    test_parallel_ops.everything(init_mesh(tp=size).tp, device)
    for sequence_parallel, dense in expected.items():
        model = f"{folder}/{sequence_parallel}"
        test_whole_model.compare(model, sequence_parallel, dense, device)
    torch.cuda.synchronize()


def on_all_gpus(fn, *args: object) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = max(torch.cuda.device_count(), 2)
    torch.multiprocessing.spawn(fn, (size, port, *args), nprocs=size)


@several
def test_ranks_on_all_gpus():
    on_all_gpus(communicate)


@several
def test_ops_and_a_whole_model_on_all_gpus(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "kernels"))
    import test_whole_model

    expected = {
        parallel: test_whole_model.dense(f"{tmp_path}/{parallel}", parallel)
        for parallel in (False, True)
    }
    on_all_gpus(through_the_table, str(tmp_path), expected)
