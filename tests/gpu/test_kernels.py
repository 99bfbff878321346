"""The CUDA kernels on one GPU: against torch, through opcheck and torch.compile, in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.ops.cross_entropy_statistics import run_torch as statistics
from tests.ops import test_softcap as softcap_checks

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
HIDDEN = [1, 45, 576, 4096, 8192, 16384]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).cuda()


def close(got: Tensor, truth: Tensor, dtype: torch.dtype, terms: int) -> None:
    got, truth = got.detach().double(), truth.detach().double()
    scale = truth.abs().clamp_min(float(truth.abs().mean()) + 1e-30)
    bound = (UNIT[dtype] + terms * 2**-24) * scale + 1e-6
    assert torch.isfinite(got).all() and ((got - truth).abs() <= bound).all()


@pytest.fixture(scope="module", autouse=True)
def ops():
    assert cuda_extension.missing() == []
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_norms(ops, dtype, hidden) -> None:
    x = randn(7, hidden, dtype=dtype).requires_grad_()
    weight = randn(hidden, dtype=dtype, seed=1).requires_grad_()
    bias, dy = randn(hidden, dtype=dtype, seed=2), randn(7, hidden, dtype=dtype, seed=3)
    truth_x, truth_weight = x.detach().double().requires_grad_(), weight.detach().double()
    for name in ("rms_norm", "layer_norm"):
        if name == "rms_norm":
            y = ops.rms_norm(x, weight, eps=1e-5)
            want = F.rms_norm(truth_x, (hidden,), truth_weight, 1e-5)
        else:
            y = ops.layer_norm(x, weight, bias, eps=1e-5)
            want = F.layer_norm(truth_x, (hidden,), truth_weight, bias.double(), 1e-5)
        close(y, want, dtype, 64)
        if hidden == 1:
            continue
        (got,) = torch.autograd.grad(y, x, dy)
        (gradient,) = torch.autograd.grad(want, truth_x, dy.double())
        close(got, gradient, dtype, 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 96, 14336])
def test_activations(ops, dtype, columns) -> None:
    both = randn(9, 2 * columns, dtype=dtype).requires_grad_()
    gate, up = both.chunk(2, dim=1)
    truth = both.detach().double().requires_grad_()
    truth_gate, truth_up = truth.chunk(2, dim=1)
    y, want = ops.gated_activation(gate, up, activation="silu"), F.silu(truth_gate) * truth_up
    close(y, want, dtype, 64)
    dy = randn(9, columns, dtype=dtype, seed=1)
    y.backward(dy)
    want.backward(dy.double())
    close(both.grad, truth.grad, dtype, 64)
    bias = randn(columns, dtype=dtype, seed=2)
    got = ops.bias_activation(gate.detach(), bias, activation="gelu_tanh")
    want = F.gelu(truth_gate.detach() + bias.double(), approximate="tanh")
    close(got, want, dtype, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_cross_entropy(ops, dtype, ranks) -> None:
    rows, vocab = 33, 3 * 16032
    logits = randn(rows, vocab, dtype=dtype) * 3
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1)).cuda()
    targets[4] = -100
    calls, size = torch.ops.pyparallel, vocab // ranks
    truth = logits.double().requires_grad_()
    lse = truth.logsumexp(1)
    dloss = torch.rand(rows, device="cuda")
    F.cross_entropy(truth, targets, reduction="none").backward(dloss.double())
    for rank, shard in enumerate(logits.split(size, dim=1)):
        part, start = shard.contiguous(), rank * size
        got = calls.cuda_cross_entropy_stats(part, targets, start, -100)
        want = statistics(part.double(), targets, start, -100)
        assert torch.equal(got[:, 0::2], want[:, 0::2].float())
        close(got[:, 1], want[:, 1], torch.float32, 4096)
        rest = (targets, lse.detach().float(), dloss, start, vocab, -100, 0.0, 0.0)
        calls.cuda_cross_entropy_gradient_(part, *rest)
        close(part, truth.grad[:, start : start + size], dtype, 4096)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 4096])
def test_rank_sum_bits(ops, dtype, columns) -> None:
    parts, out = randn(8, 50, columns, dtype=dtype), torch.empty(50, columns, dtype=dtype).cuda()
    ops.rank_sum(parts, out)
    total = torch.zeros(50, columns, device="cuda")
    for part in parts:
        total += part.float()
    assert torch.equal(out, total.to(dtype))


def test_opcheck(ops) -> None:
    x, weight = randn(6, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16, seed=1)
    calls = torch.ops.pyparallel
    for op, args in (
        (calls.cuda_rms_norm, (x.requires_grad_(), weight, 1e-5)),
        (calls.cuda_add_rms_norm, (x, x.detach(), weight, 1e-5)),
        (calls.cuda_layer_norm, (x, weight, None, 1e-5)),
        (calls.cuda_bias_activation, (x, weight, 3)),
        (calls.cuda_gated_activation, (x, x.detach(), weight, None, 2)),
        (calls.cuda_rank_sum, (x.detach().view(2, 3, 64), None, None, x.detach()[:3].clone())),
    ):
        torch.library.opcheck(op, args)


def test_compile_fullgraph(ops) -> None:
    x, weight = randn(6, 64, dtype=torch.float32), randn(64, dtype=torch.float32, seed=1)

    def block(x: Tensor, weight: Tensor) -> Tensor:
        y, h = ops.add_rms_norm(x, x, weight, eps=1e-5)
        return ops.bias_activation(y, weight, activation="silu") + h

    assert torch.equal(torch.compile(block, fullgraph=True)(x, weight), block(x, weight))


def test_graph_capture(ops) -> None:
    x, weight = randn(6, 4096, dtype=torch.bfloat16), randn(4096, dtype=torch.bfloat16, seed=1)
    ops.rms_norm(x, weight, eps=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.rms_norm(x, weight, eps=1e-5)
    for seed in range(3):
        x.copy_(randn(6, 4096, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(y, ops.rms_norm(x, weight, eps=1e-5))


@pytest.mark.parametrize("row", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(row, dtype) -> None:
    for shape in softcap_checks.SHAPES:
        softcap_checks.check(row, shape, dtype, 30.0, "cuda")
    softcap_checks.check_ends(row, "cuda")
