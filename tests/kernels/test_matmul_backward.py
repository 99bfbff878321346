import pytest
import torch
from helpers import DTYPES, integers, normal, strided

from pyparallel.kernels.matmul.matmul import matmul_out
from pyparallel.kernels.matmul.matmul_backward import matmul_backward


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
    grads = matmul_backward(dout, x, w, pre_activation=pre, activation=activation, need_dbias=True)
    leaves = [t.double().requires_grad_() for t in (x, w, bias)]
    y = leaves[0] @ leaves[1].T + leaves[2]
    acts = {
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    }
    acts[activation](y).backward(dout.double())
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="pre_activation: expected the tensor"):
        matmul_backward(dout, x, w, activation=activation)
