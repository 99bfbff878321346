"""Row-parallel layers on several GPUs take the sums over peer memory, with the plain path's bits."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.group import Group
from pyparallel.layers.norm import RMSNorm
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.ops.row_parallel_linear import linear_then_all_reduce
from tests.gpu.ranks import run_on_gpus, several, world_sizes

pytestmark = [pytest.mark.gpu, several]


def fused_layer(c: NcclCommunicator, rows: int, bias: bool) -> None:
    from pyparallel.ops.cuda import all_reduce_residual_rms_norm

    group, width = Group.over(c), 1024
    torch.manual_seed(0)
    how = {"device": "cuda", "dtype": torch.bfloat16}
    layer = RowParallelLinear(512 * c.size, width, bias, **how, group=group)
    norm = RMSNorm(width, eps=1e-5, **how)
    generator = torch.Generator(device="cuda").manual_seed(c.rank)
    x = torch.randn(1, rows, 512, generator=generator, device="cuda").bfloat16()
    residual = torch.ones(1, rows, width, device="cuda").bfloat16()
    call = (residual, residual, norm.weight, 1e-5, group)
    run = backend.offered("all_reduce_residual_rms_norm", *call)
    assert run is all_reduce_residual_rms_norm.run
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    got = layer.add_and_norm(*leaves, norm)
    grads = torch.autograd.grad(sum(t.float().sum() for t in got), leaves)
    plain = [t.clone().requires_grad_() for t in (x, residual)]
    h = plain[1] + layer(plain[0])
    want = norm(h), h
    wanted = torch.autograd.grad(sum(t.float().sum() for t in want), plain)
    assert torch.equal(got[1], want[1])
    # The norm of h by another number of lanes: one rounding to 8 bits apart at most.
    assert ((got[0].float() - want[0].float()).abs() <= 2**-7 * want[0].float().abs()).all()
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)
    c.peers.check()


@pytest.mark.parametrize("size", world_sizes())
@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_reduction_residual_and_norm(size, rows, bias) -> None:
    run_on_gpus(fused_layer, size, rows, bias)


def sum_of_a_matmul(c: NcclCommunicator) -> None:
    group = Group.over(c)
    generator = torch.Generator(device="cuda").manual_seed(c.rank)
    x = torch.randn(3, 512, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(1024, 512, generator=generator, device="cuda").bfloat16()
    bias = torch.ones(1024, device="cuda").bfloat16()
    with backend.use("cuda"):
        got = backend.call("linear_all_reduce", x, weight, bias, group)
    with backend.use("torch"):
        want = linear_then_all_reduce(x, weight, bias, group)
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", world_sizes())
def test_linear_all_reduce(size) -> None:
    run_on_gpus(sum_of_a_matmul, size)
