"""The bodies of the CUDA kernels, run on the host against torch: every dtype, wide and single accesses,
one lane and several, forward and backward."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyparallel import _C, reference
from pyparallel.ops.cross_entropy_statistics import run_torch as statistics

NATIVE = Path(__file__).parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODE = {dtype: code for code, dtype in enumerate(DTYPES)}
# Relative rounding error of one store: half a unit in the last place.
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Odd and even, shorter and longer than what a lane keeps (4 vecs a lane).
WIDTHS = [(1, False), (7, False), (45, False), (8, True), (48, True), (296, True)]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    subprocess.run(["make", "-s", "-C", str(NATIVE), "build/libcuda_host.so"], check=True)
    return ctypes.CDLL(str(NATIVE / "build" / "libcuda_host.so"))


def run(function, *arguments) -> None:
    """Calls a C function: tensors by address, None as null, floats as float, the rest as 64-bit ints."""
    converted: list = []
    for value in arguments:
        if isinstance(value, Tensor):
            converted.append(ctypes.c_void_p(value.data_ptr()))
        elif value is None:
            converted.append(ctypes.c_void_p(None))
        elif isinstance(value, float):
            converted.append(ctypes.c_float(value))
        else:
            converted.append(ctypes.c_int64(int(value)))
    function(*converted)


def close(
    got: Tensor, truth: Tensor, dtype: torch.dtype, *, terms: int = 1, largest: float = 0.0
) -> None:
    """One rounding of the fp64 truth to dtype, and the error of `terms` fp32 operations before it.

    largest: the size of what cancels in the result, where that is larger than the result.
    """
    got, truth = got.double(), truth.double()
    scale = truth.abs().clamp_min(max(float(truth.abs().mean()), largest) + 1e-30)
    bound = (UNIT[dtype] + terms * 2**-24) * scale + 1e-7
    error = (got - truth).abs()
    assert torch.isfinite(got).all()
    assert (error <= bound).all(), f"largest error over bound: {float((error / bound).max()):.3g}"


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


cases = pytest.mark.parametrize(
    ("dtype", "hidden", "wide", "lanes"),
    [(d, h, w, lanes) for d in DTYPES for h, w in WIDTHS for lanes in (1, 4)],
)


@cases
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(library, dtype, hidden, wide, lanes, residual) -> None:
    rows, eps = 3, 1e-5
    x, other = randn(rows, hidden, dtype=dtype), randn(rows, hidden, dtype=dtype, seed=1)
    weight, dy = randn(hidden, dtype=dtype, seed=2), randn(rows, hidden, dtype=dtype, seed=3)
    y, summed, rstd = nan(rows, hidden, dtype=dtype), nan(rows, hidden, dtype=dtype), nan(rows)
    run(
        library.host_rms_norm,
        *(CODE[dtype], wide, lanes, x, other if residual else None, weight, y),
        *(summed if residual else None, rstd, rows, hidden, eps),
    )
    h = x + other if residual else x
    if residual:
        assert torch.equal(summed, h)
    truth = h.double().requires_grad_()
    scale = weight.double().requires_grad_()
    want = truth * (truth.square().mean(-1, keepdim=True) + eps).rsqrt() * scale
    close(y, want.detach(), dtype, terms=hidden)
    close(y, reference.rms_norm(h.double(), weight.double(), eps), dtype, terms=hidden)
    want.backward(dy.double())

    dx = nan(rows, hidden, dtype=dtype)
    run(
        library.host_rms_norm_backward,
        *(CODE[dtype], wide, lanes, dy, h, weight, rstd, dx, rows, hidden),
    )
    largest = float((rstd[:, None] * dy.float() * weight.float()).abs().max())
    close(dx, truth.grad, dtype, terms=4 * hidden, largest=largest)
    dweight, dbias, partial = nan(hidden, dtype=dtype), nan(hidden, dtype=dtype), nan(4 * hidden)
    run(
        library.host_column_sum,
        *(CODE[dtype], wide, 2, dy, h, None, rstd, partial, dweight, dbias, rows, hidden),
    )
    close(dweight, scale.grad, dtype, terms=4 * hidden)
    close(dbias, dy.double().sum(0), dtype, terms=rows)


@cases
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(library, dtype, hidden, wide, lanes, bias) -> None:
    rows, eps = 3, 1e-5
    # A large common offset: a variance taken naively would lose it.
    x, weight = randn(rows, hidden, dtype=dtype) + 8, randn(hidden, dtype=dtype, seed=1)
    shift, dy = randn(hidden, dtype=dtype, seed=2), randn(rows, hidden, dtype=dtype, seed=3)
    y, mean, rstd = nan(rows, hidden, dtype=dtype), nan(rows), nan(rows)
    run(
        library.host_layer_norm,
        *(CODE[dtype], wide, lanes, x, weight, shift if bias else None, y, mean, rstd),
        *(rows, hidden, eps),
    )
    truth, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    offset = shift.double().requires_grad_()
    want = torch.nn.functional.layer_norm(truth, (hidden,), scale, offset if bias else None, eps)
    close(y, want.detach(), dtype, terms=64 * hidden)
    want.backward(dy.double())

    dx = nan(rows, hidden, dtype=dtype)
    run(
        library.host_layer_norm_backward,
        *(CODE[dtype], wide, lanes, dy, x, weight, mean, rstd, dx, rows, hidden),
    )
    largest = float((rstd[:, None] * dy.float() * weight.float()).abs().max())
    close(dx, truth.grad, dtype, terms=64 * hidden, largest=largest)
    dweight, dbias, partial = nan(hidden, dtype=dtype), nan(hidden, dtype=dtype), nan(4 * hidden)
    run(
        library.host_column_sum,
        *(CODE[dtype], wide, 2, dy, x, mean, rstd, partial, dweight, dbias, rows, hidden),
    )
    close(dweight, scale.grad, dtype, terms=64 * hidden)
    if bias:
        close(dbias, offset.grad, dtype, terms=rows)


KINDS = {"none": lambda x: x, **reference.ACTIVATIONS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "wide"), [(5, False), (24, True)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_bias_activation(library, dtype, columns, wide, kind, bias) -> None:
    rows, stride = 4, columns + 8
    x = randn(rows, stride, dtype=dtype)[:, :columns] * 3
    padded = torch.zeros(rows, stride, dtype=dtype)
    padded[:, :columns] = x
    shift, dy = randn(columns, dtype=dtype, seed=1), randn(rows, columns, dtype=dtype, seed=2)
    y, dx = nan(rows, columns, dtype=dtype), nan(rows, columns, dtype=dtype)
    common = (CODE[dtype], wide, padded, shift if bias else None)
    run(library.host_bias_activation, *common, None, y, rows, columns, stride, _C.ACTIVATIONS[kind])
    run(library.host_bias_activation, *common, dy, dx, rows, columns, stride, _C.ACTIVATIONS[kind])
    truth = (x.double() + (shift.double() if bias else 0)).requires_grad_()
    want = KINDS[kind](truth)
    close(y, want.detach(), dtype, terms=32)
    want.backward(dy.double())
    close(dx, truth.grad, dtype, terms=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "wide"), [(1, False), (37, False), (1, True), (37, True), (64, True)]
)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap(library, dtype, n, wide, cap) -> None:
    x, dy = randn(n, dtype=dtype) * 2 * cap, randn(n, dtype=dtype, seed=1)
    y, dx = nan(n, dtype=dtype), nan(n, dtype=dtype)
    run(library.host_softcap, CODE[dtype], wide, x, None, y, n, cap)
    run(library.host_softcap, CODE[dtype], wide, x, dy, dx, n, cap)
    truth = x.double().requires_grad_()
    want = torch.tanh(truth / cap) * cap
    close(y, want.detach(), dtype, terms=8)
    want.backward(dy.double())
    # 1 - tanh cancels where it is near 1: errors are of dy's size.
    close(dx, truth.grad, dtype, terms=8, largest=float(dy.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "wide"), [(5, False), (24, True)])
@pytest.mark.parametrize("kind", reference.GATES)
def test_gated_activation(library, dtype, columns, wide, kind) -> None:
    rows = 4
    both = randn(rows, 2 * columns, dtype=dtype) * 2
    gate_bias, up_bias = randn(columns, dtype=dtype, seed=1), randn(columns, dtype=dtype, seed=2)
    dy = randn(rows, columns, dtype=dtype, seed=3)
    y, dboth = nan(rows, columns, dtype=dtype), nan(rows, 2 * columns, dtype=dtype)
    gate, up, dgate, dup = both[:, :columns], both[:, columns:], dboth, dboth[:, columns:]
    common = (CODE[dtype], wide, gate, up, gate_bias, up_bias)
    sizes = (rows, columns, 2 * columns, 2 * columns, _C.ACTIVATIONS[kind])
    run(library.host_gated_activation, *common, None, y, None, None, *sizes)
    run(library.host_gated_activation, *common, dy, None, dgate, dup, *sizes)
    g = (gate.double() + gate_bias.double()).requires_grad_()
    u = (up.double() + up_bias.double()).requires_grad_()
    want = KINDS[kind](g) * u
    close(y, want.detach(), dtype, terms=32)
    want.backward(dy.double())
    close(dboth, torch.cat([g.grad, u.grad], 1), dtype, terms=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("vocab", [(37, False), (240, True)])
@pytest.mark.parametrize(
    ("smoothing", "z_loss", "offset"), [(0.0, 0.0, 0.0), (0.1, 1e-3, 0.0), (0.1, 1e-6, 4096.0)]
)
def test_cross_entropy(library, dtype, lanes, ranks, vocab, smoothing, z_loss, offset) -> None:
    """Statistics as `ops.cross_entropy_statistics` defines them; the gradient against autograd."""
    (size, wide), rows, ignored = vocab, 6, -100
    logits = randn(rows, size, dtype=dtype) * 4 + offset
    if not smoothing:
        logits[1, 0] = -torch.inf
    targets = torch.tensor([0, size - 1, 5, ignored, size // 2, size // 3])
    unit = 8 if wide else 1
    cuts = [unit * (size // unit * r // ranks) for r in range(ranks)] + [size]
    shards = [logits[:, a:b].contiguous() for a, b in itertools.pairwise(cuts)]
    for shard, start in zip(shards, cuts, strict=False):
        stats, columns = nan(rows, 4), shard.shape[1]
        run(
            library.host_cross_entropy_stats,
            *(CODE[dtype], wide, lanes, shard, targets, stats),
            *(rows, columns, columns, start, ignored),
        )
        want = statistics(shard.double(), targets, start, ignored)
        assert torch.equal(stats[:, 0], want[:, 0].float())
        assert torch.equal(stats[:, 2], want[:, 2].float())
        close(stats[:, 1], want[:, 1], torch.float32, terms=columns)
        finite = want[:, 3].isfinite()
        centered = (shard.double() - want[:, :1]).nan_to_num(posinf=0.0, neginf=0.0)
        largest = float(centered.abs().sum(1).max())
        close(stats[finite, 3], want[finite, 3], torch.float32, terms=columns, largest=largest)

    truth = logits.double().requires_grad_()
    lse = truth.logsumexp(1)
    losses = torch.nn.functional.cross_entropy(
        truth, targets, reduction="none", ignore_index=ignored, label_smoothing=smoothing
    )
    losses = losses + z_loss * lse.square() * (targets != ignored)
    dloss = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    losses.backward(dloss.double())
    for rank, shard in enumerate(shards):
        columns = shard.shape[1]
        run(
            library.host_cross_entropy_gradient,
            *(CODE[dtype], wide, lanes, shard, targets, (lse.detach() - offset).float(), dloss),
            *(rows, columns, columns, cuts[rank], ignored),
            *(1.0 - smoothing, smoothing / size, z_loss),
            torch.full((rows,), offset) if offset else None,
        )
        close(shard, truth.grad[:, cuts[rank] : cuts[rank + 1]], dtype, terms=64, largest=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("columns", "wide"), [(5, False), (24, True)])
def test_rank_sum_is_ordered(library, dtype, ranks, columns, wide) -> None:
    """Bit for bit the sequential fp32 sum; the opposite order gives other bits, so this can fail."""
    rows = 16
    parts = randn(ranks, rows + 1, columns, dtype=dtype) * 5
    out = nan(rows, columns, dtype=dtype)
    stride = (rows + 1) * columns
    run(
        library.host_rank_sum,
        *(CODE[dtype], wide, parts, None, None, out, ranks, stride, rows, columns),
    )
    ordered = torch.zeros(rows, columns)
    for part in parts[:, :rows]:
        ordered += part.float()
    assert torch.equal(out, ordered.to(dtype))
    bias, residual = randn(columns, dtype=dtype, seed=1), randn(rows, columns, dtype=dtype, seed=2)
    run(
        library.host_rank_sum,
        *(CODE[dtype], wide, parts, bias, residual, out, ranks, stride, rows, columns),
    )
    assert torch.equal(out, (ordered + bias.float() + residual.float()).to(dtype))
    if ranks == 8 and dtype == torch.float32:
        backwards = torch.zeros(rows, columns)
        for part in reversed(parts[:, :rows]):
            backwards += part.float()
        assert not torch.equal(ordered, backwards)
