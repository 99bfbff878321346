import math

import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, integers, normal, rounding_bound, strided

from pyparallel.kernels.matmul.matmul import matmul_out
from pyparallel.kernels.matmul.matmul_backward import matmul_backward
from pyparallel.reference import ACTIVATIONS
from tests.bounds import SECOND_ORDER, ULPS


def slope_terms(activation: str, x: torch.Tensor) -> torch.Tensor:
    """Of an activation's derivative, the sizes of what is summed: each errs by a few units of itself.

    An exponential's argument a errs by a's roundings, so its value errs by |a| times as much.
    """
    if activation == "relu":
        return torch.zeros_like(x)
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x.abs() * (1 + s)) * (1 + x.abs())
    if activation == "gelu":
        density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return 1 + x.abs() * density * (1 + x**2 / 2)
    inner = math.sqrt(2 / math.pi) * (x.abs() + 0.044715 * x.abs() ** 3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    t = torch.tanh(inner)
    # 1 - t^2 is a difference of numbers near one.
    return 1 + t + x.abs() / 2 * slope * ((1 + t**2) + 2 * inner * (1 - t**2)) + inner * (1 - t**2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 20, 45), (5, 70, 33)])
def test_exact_on_small_integers(dtype, shape, device):
    m, n, k = shape
    x, w = integers(m, k, dtype=dtype, device=device), integers(n, k, dtype=dtype, device=device)
    dout = integers(m, n, dtype=dtype, device=device, seed=3)
    grads = matmul_backward(strided(dout), x, w, need_dbias=True)
    for got, truth in zip(
        grads,
        (dout.double() @ w.double(), dout.double().T @ x.double(), dout.double().sum(0)),
        strict=True,
    ):
        # Rounded once: an exact sum over fp16's or bf16's integers may need it.
        assert torch.equal(got, truth.to(dtype))


def test_accumulates_into_a_wide_buffer(device):
    x, w = integers(9, 33, device=device).half(), integers(8, 33, device=device).half()
    dout = integers(9, 8, device=device).half()
    main = torch.full((8, 33), 2.0**-12, device=device)
    grads = matmul_backward(dout, x, w, need_dx=False, accumulate_into=main)
    assert grads.dx is None and grads.dw is main
    assert torch.equal(main.double(), dout.double().T @ x.double() + 2.0**-12)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_through_the_activation(activation, device):
    x, w = normal(10, 20, device=device), normal(12, 20, device=device)
    bias, dout = normal(12, device=device), normal(10, 12, device=device)
    pre = torch.empty(10, 12, device=device)
    matmul_out(
        x,
        w,
        torch.empty(10, 12, device=device),
        bias=bias,
        activation=activation,
        pre_activation=pre,
    )
    sizes = x.double().abs() @ w.double().abs().T + bias.double().abs()
    truth = x.double() @ w.double().T + bias.double()
    assert_within(pre, truth, rounding_bound(truth, x.dtype, sizes, 20), "pre-activation")
    grads = matmul_backward(dout, x, w, pre_activation=pre, activation=activation, need_dbias=True)
    # From here on what counts is the pre-activation that was kept, to its last bit.
    wide = pre.double().requires_grad_()
    ACTIVATIONS[activation](wide).sum().backward()
    terms = slope_terms(activation, pre.double())
    g = dout.double() * wide.grad
    of_g = dout.double().abs() * (ULPS + 8) * UNIT[x.dtype] * terms
    x, w = x.double(), w.double()
    for name, got, truth, sizes, inherited, count in (
        ("dx", grads.dx, g @ w, g.abs() @ w.abs(), of_g @ w.abs(), 12),
        ("dw", grads.dw, g.T @ x, g.abs().T @ x.abs(), of_g.T @ x.abs(), 10),
        ("dbias", grads.dbias, g.sum(0), g.abs().sum(0), of_g.sum(0), 10),
    ):
        bound = rounding_bound(truth, got.dtype, sizes, count) + inherited
        assert_within(got, truth, SECOND_ORDER * bound, name)
    with pytest.raises(ValueError, match="pre_activation: expected the tensor"):
        matmul_backward(dout, x, w, activation=activation)
