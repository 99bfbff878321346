import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal, padded

from pyparallel import reference
from pyparallel.kernels.elementwise.dropout import Dropout, dropout
from pyparallel.kernels.norm.norm import layer_norm, rms_norm
from pyparallel.kernels.norm.norm_backward import column_sum_out, norm_backward

EPS = 1e-5
ROWS = [(1, 1), (3, 7), (2, 5, 64), (17, 130)]


def run(center, x, weight, bias, **extra):
    if center:
        return layer_norm(x, weight, bias, eps=EPS, **extra)
    return rms_norm(x, weight, eps=EPS, **extra)


def truth_of(center, h, weight, bias):
    h, weight = h.double(), weight.double()
    if center:
        return reference.layer_norm(h, weight, bias.double(), EPS)
    return reference.rms_norm(h, weight, EPS)


def bound_of(truth, dtype, width, weight):
    """fp32 statistics: (width + 10) u32 relative to the weight, then one rounding."""
    fp32 = (width + 10) * UNIT[torch.float32] * (weight.double().abs() * (2 + truth.abs()))
    return 2 * UNIT[dtype] * truth.abs() + 8 * fp32 + 1e-7


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_forward(center, dtype, shape, device):
    width = shape[-1]
    x = normal(*shape, dtype=dtype, device=device)
    weight, bias = normal(width, dtype=dtype, device=device), normal(width, dtype=dtype, seed=1)
    bias = bias.to(device)
    result = run(center, x, weight, bias)
    truth = truth_of(center, x, weight, bias)
    assert result.h is x
    assert_within(result.out, truth, bound_of(truth, dtype, width, weight))


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_rounded_then_normalized(center, dtype, device):
    x, residual = normal(6, 40, dtype=dtype, device=device), normal(6, 40, dtype=dtype, seed=3)
    residual = residual.to(device)
    weight, bias = normal(40, dtype=dtype, device=device), normal(40, dtype=dtype, device=device)
    result = run(center, padded(x), weight, bias, residual=padded(residual))
    assert torch.equal(result.h, (x.float() + residual.float()).to(dtype))
    truth = truth_of(center, result.h, weight, bias)
    assert_within(result.out, truth, bound_of(truth, dtype, 40, weight))


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (37, 50)])
def test_backward(center, dtype, shape, device):
    width = shape[-1]
    h = normal(*shape, dtype=dtype, device=device)
    weight, bias = normal(width, dtype=dtype, device=device), normal(width, dtype=dtype)
    bias = bias.to(device)
    dout, after = normal(*shape, dtype=dtype, seed=5), normal(*shape, dtype=dtype, seed=6)
    dout, after = dout.to(device), after.to(device)
    result = run(center, h, weight, bias)
    grads = norm_backward(
        dout, h, weight, result.mean, result.rstd, has_bias=center, dh_after=after
    )

    leaves = [t.double().requires_grad_() for t in (h, weight, bias)]
    truth_of(center, *leaves).backward(dout.double())
    dh = leaves[0].grad + after.double()
    # rstd relative error (width + 10) u32; dh sums terms of size rstd * |dout * weight|.
    scale = result.rstd.double().view(-1, 1) * 4 * (dout * weight).double().abs().amax(1, True)
    fp32 = (width + 20) * UNIT[torch.float32]
    n_size = 2 + result.rstd.double().view(-1, 1) * h.double().abs().amax(1, True)
    assert_within(grads.dx, dh, 2 * UNIT[dtype] * dh.abs() + 8 * fp32 * scale * n_size**2, "dx")
    assert grads.dresidual.data_ptr() == grads.dx.data_ptr()
    terms = (dout.double().abs() * n_size).sum(0)
    assert_within(
        grads.dweight,
        leaves[1].grad,
        2 * UNIT[dtype] * leaves[1].grad.abs() + 8 * fp32 * terms,
        "dweight",
    )
    if center:
        assert_within(
            grads.dbias,
            leaves[2].grad,
            2 * UNIT[dtype] * leaves[2].grad.abs() + 8 * fp32 * dout.double().abs().sum(0),
            "dbias",
        )


def test_philox_answers_as_published():
    """Known answers of the Random123 library for philox4x32-10."""
    assert reference.philox_word(torch.tensor([0]), 0).item() == 0x6627E8D5
    assert reference.philox_word(torch.tensor([-1]), -1).item() != 0x6627E8D5


@pytest.mark.parametrize("seed", [0, 1234567, 2**40 + 5])
def test_dropout_mask_is_a_function_of_the_place(seed, device):
    x = torch.ones(2, 12, 50, device=device)
    p = 0.3
    index = torch.arange(x.numel(), device=device).view(x.shape)
    keep = reference.dropout_keep(index, p, seed)
    whole = dropout(x, dropout=Dropout(p, seed))
    assert torch.equal(whole, torch.where(keep, torch.tensor(1 / (1 - p), device=device), 0.0))
    assert abs(keep.double().mean() - (1 - p)) < 0.05
    for ranks in (2, 3):
        rows = 12 // ranks
        for rank in range(ranks):
            part = slice(rank * rows, (rank + 1) * rows)
            shard = Dropout(p, seed, rows_local=rows, rows_global=12, row_start=rank * rows)
            got = dropout(
                x[:, part].contiguous(), dropout=shard, residual=whole[:, part].contiguous()
            )
            assert torch.equal(got, 2 * whole[:, part])


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
def test_dropout_inside_the_norm_and_back(center, device):
    x, residual = normal(8, 30, device=device), normal(8, 30, device=device, seed=2)
    weight, bias = normal(30, device=device), normal(30, device=device, seed=9)
    drop = Dropout(0.25, 77, rows_local=4, rows_global=10, row_start=3)
    result = run(center, x, weight, bias, residual=residual, dropout=drop)
    dropped = dropout(x, dropout=drop, residual=residual)
    assert torch.equal(result.h, dropped)
    assert torch.equal(result.out, run(center, dropped, weight, bias).out)
    dout = normal(8, 30, device=device, seed=4)
    grads = norm_backward(
        dout, result.h, weight, result.mean, result.rstd, has_bias=center, dropout=drop
    )
    assert torch.equal(grads.dx, dropout(grads.dresidual, dropout=drop))


def test_column_sum_accumulates(device):
    x = torch.arange(70.0, device=device).view(35, 2)
    out = torch.ones(2, device=device)
    column_sum_out(x, out, accumulate=True)
    assert out.tolist() == [1 + x[:, 0].sum().item(), 1 + x[:, 1].sum().item()]


def test_empty_and_bad_input(device):
    empty = rms_norm(torch.zeros(0, 8, device=device), torch.ones(8, device=device), eps=EPS)
    assert empty.out.shape == (0, 8)
    x = torch.zeros(4, 8, device=device)
    grads = norm_backward(x[:0], x[:0], torch.ones(8, device=device), None, empty.rstd)
    assert torch.equal(grads.dweight, torch.zeros(8, device=device))
    with pytest.raises(ValueError, match=r"weight: expected shape \(8,\), got \(7,\)"):
        rms_norm(x, torch.ones(7, device=device), eps=EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x.T, torch.ones(4, device=device), eps=EPS)
    with pytest.raises(ValueError, match="0 <= p < 1"):
        dropout(x, dropout=Dropout(1.0, 0))
    with pytest.raises(ValueError, match="rows_local dividing 4"):
        dropout(x, dropout=Dropout(0.5, 0, rows_local=3))
    with pytest.raises(ValueError, match="at most 16384"):
        rms_norm(torch.zeros(1, 40000, device=device), None, eps=EPS)


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
def test_wide_rows_take_the_same_steps(center, device, monkeypatch):
    """Rows too wide for the fused dropout and bias gradient: same answers, more launches."""
    from pyparallel.kernels.norm import norm as forward
    from pyparallel.kernels.norm import norm_backward as backward

    x, residual = normal(9, 20, device=device), normal(9, 20, device=device, seed=2)
    weight, bias = normal(20, device=device), normal(20, device=device, seed=9)
    dout, drop = normal(9, 20, device=device, seed=4), Dropout(0.25, 77)

    def both():
        result = run(center, x, weight, bias, residual=residual, dropout=drop)
        return result, norm_backward(
            dout, result.h, weight, result.mean, result.rstd, has_bias=center, dropout=drop
        )

    narrow_result, narrow_grads = both()
    monkeypatch.setattr(forward, "WIDE_ROW", 16)
    monkeypatch.setattr(backward, "WIDE_ROW", 16)
    result, grads = both()
    assert torch.equal(result.out, narrow_result.out) and torch.equal(result.h, narrow_result.h)
    assert torch.equal(grads.dx, narrow_grads.dx)
    assert torch.equal(grads.dweight, narrow_grads.dweight)
    if center:
        assert_within(grads.dbias, narrow_grads.dbias, 1e-5, "dbias")
