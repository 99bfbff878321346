import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal

from pyparallel import reference
from pyparallel.kernels.attention.attention import attention
from pyparallel.kernels.attention.attention_backward import attention_backward


def inputs(b, s, t, n, g, d, dtype, device):
    shapes = [(b, s, n, d), (b, t, g, d), (b, t, g, d), (b, s, n, d)]
    return [normal(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


def check(q, k, v, do, *, dlse=None, **mask):
    o, lse = attention(q, k, v, **mask)
    grads = attention_backward(do, q, k, v, o, lse, dlse=dlse, **mask)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth, truth_lse = reference.attention(*leaves, **mask)
    # The reference computes in the leaves' precision; a row that sees no key has no gradient.
    total = (truth * do.double()).sum()
    if dlse is not None:
        total = total + (truth_lse.nan_to_num(neginf=0.0) * dlse.double()).sum()
    total.backward()
    # p, ds are rounded once to the operand dtype, and o (inside delta) once; each enters a
    # sum of at most `terms` products of at most `size`.
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    unit = UNIT[dtype] + 64 * UNIT[torch.float32]
    size = do.double().abs().amax() * v.double().abs().amax() * q.shape[3]
    for name, got, leaf, other in zip(("dq", "dk", "dv"), grads, leaves, (k, q, do), strict=True):
        terms = 1.0 if name == "dq" else group * q.shape[1] ** 0.5
        bound = 4 * unit * (leaf.grad.abs() + size * other.double().abs().amax() * terms)
        assert_within(got, leaf.grad, bound, name)
        # That is loose where cancellation is worst, so the whole is also judged by its norm;
        # the gradient of a lone key is all cancellation, from terms of the size of do.
        error = (got.double() - leaf.grad).norm()
        assert error <= 32 * unit * (leaf.grad.norm() + do.double().norm()), f"{name}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_dtypes(dtype, causal, device):
    check(*inputs(1, 21, 35, 4, 2, 24, dtype, device), causal=causal)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 16), (2, 17, 17, 3, 1, 32), (1, 18, 33, 2, 2, 80)]
)
def test_shapes(shape, device):
    check(*inputs(*shape, torch.float32, device), causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 16, 40])
def test_sliding_window(window, causal, device):
    check(*inputs(1, 35, 41, 2, 1, 16, torch.float32, device), causal=causal, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(d, dtype, device):
    check(*inputs(1, 20, 33, 2, 1, d, dtype, device), causal=True)


def test_gradient_of_lse_and_of_scale(device):
    q, k, v, do = inputs(1, 19, 23, 2, 2, 16, torch.float32, device)
    dlse = normal(1, 2, 19, device=device, seed=8)
    check(q, k, v, do, dlse=dlse, causal=True, scale=0.2)


def test_queries_that_see_nothing_have_zero_gradient(device):
    q, k, v, do = inputs(1, 30, 5, 2, 2, 16, torch.float32, device)
    o, lse = attention(q, k, v, causal=True)
    dq, _, _ = attention_backward(do, q, k, v, o, lse, causal=True)
    assert (dq[:, :25] == 0).all()
    check(q, k, v, do, causal=True)


def test_varlen_is_each_sequence_by_itself(device):
    q, k, v, do = inputs(1, 24, 30, 4, 2, 16, torch.float32, device)
    cu_q = torch.tensor([0, 5, 5, 23, 24], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 9, 12, 30, 30], dtype=torch.int32, device=device)
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    o, lse = attention(q, k, v, causal=True, **cu)
    grads = attention_backward(do, q, k, v, o, lse, causal=True, **cu)
    for i in range(4):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        part = (q[:, rows], k[:, keys], v[:, keys])
        alone = attention_backward(do[:, rows], *part, o[:, rows], lse[:, :, rows], causal=True)
        for got, expected, where in zip(grads, alone, (rows, keys, keys), strict=True):
            assert torch.equal(got[:, where], expected)
