"""Soft-capping: values and gradients of every row against fp64, the ends, and what is refused."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.ops.softcap import softcap
from pyparallel.testing import UNIT_ROUNDOFF, normals

# The rows that run on this machine's processor without Triton's interpreter.
ROWS = ("torch", "reference", "cpu", None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, none, a whole tile, and what no tile divides.
SHAPES = ((1,), (0, 3), (1024,), (3, 5, 331))
CAPS = (0.5, 30.0, 50.0)
# What tests/ops/test_table.py asks the table with.
TABLE_CALL = (torch.linspace(-9.0, 9.0, 7), 2.0)


def check(row: str | None, shape: tuple[int, ...], dtype: torch.dtype, cap: float, device="cpu"):
    """Values and gradients of a row, within the roundings of its few steps."""
    x = normals(*shape, seed=1, scale=2 * cap, dtype=dtype).to(device).requires_grad_()
    dy = normals(*shape, seed=2, dtype=dtype).to(device)
    with backend.use(row) if row else nullcontext():
        y = softcap(x, cap)
        (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    truth = torch.tanh(wide / cap) * cap
    (slope,) = torch.autograd.grad(truth, wide, dy.double())
    assert y.dtype == dx.dtype == dtype
    # Rounded in x's dtype: the quotient, whose error tanh never enlarges, tanh, and the product; in the
    # gradient, 1 - t^2 has t's error twice. Half precision adds what it can't hold near 0.
    unit = UNIT_ROUNDOFF[dtype]
    least = torch.finfo(dtype).smallest_normal
    bound = 4 * unit * truth.detach().abs() + 8 * 2.0**-24 * cap + cap * least
    assert ((y.double() - truth).abs() <= bound).all()
    bound = 8 * (unit + 2.0**-24) * dy.double().abs() + least
    assert ((dx.double() - slope).abs() <= bound).all()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(row, dtype):
    for shape in SHAPES:
        for cap in CAPS:
            check(row, shape, dtype, cap)


def check_ends(row: str | None, device: str = "cpu") -> None:
    """Infinities, NaN, zeros of both signs, and what is far beyond the cap or tiny beside it."""
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, 1e-30], device=device)
    with backend.use(row) if row else nullcontext():
        leaf = x.clone().requires_grad_()
        y = softcap(leaf, 30.0)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(x))
    assert y[:2].tolist() == [30.0, -30.0] and y[2].isnan()
    assert y[3:5].tolist() == [0.0, -0.0] and y[5] == 30.0
    assert abs(y[6].item() - 1e-30) <= 1e-36
    assert dx[:2].tolist() == [0.0, 0.0] and dx[2].isnan()
    assert dx[3:].tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("row", ROWS)
def test_the_ends(row):
    check_ends(row)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_that_is_none_is_refused(cap):
    with pytest.raises(ValueError, match="cap: expected more than 0, got"):
        softcap(torch.ones(2), cap)


def test_a_view_is_capped_and_gets_its_gradient():
    x = normals(4, 6, seed=3).requires_grad_()
    y = softcap(x.t()[1:], 2.0)
    assert torch.equal(y, softcap(x.t()[1:].contiguous(), 2.0))
    y.sum().backward()
    assert (x.grad[:, 0] == 0).all() and (x.grad[:, 1:] > 0).all()


def test_second_order_and_graphs():
    x = normals(3, 4, seed=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: softcap(t, 2.0), x)
    assert torch.autograd.gradgradcheck(lambda t: softcap(t, 2.0), x)

    def step(t: Tensor) -> Tensor:
        return softcap(t * 2, 2.0)

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(x), step(x))
