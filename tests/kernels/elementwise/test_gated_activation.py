import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal, padded

from pyparallel import reference
from pyparallel.kernels.elementwise.gated_activation import (
    gated_activation,
    gated_activation_backward,
)

KINDS = ["silu", "gelu", "gelu_tanh", "relu"]


def act(x, kind):
    return reference.activation(x, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_forward_and_backward(dtype, kind, gated, device):
    gate = normal(3, 5, 33, dtype=dtype, device=device, scale=3)
    up = normal(3, 5, 33, dtype=dtype, device=device, seed=1) if gated else None
    dout = normal(3, 5, 33, dtype=dtype, device=device, seed=2)
    leaves = [t.double().requires_grad_() for t in ((gate, up) if gated else (gate,))]
    truth = act(leaves[0], kind) * (leaves[1] if gated else 1.0)
    truth.backward(dout.double())
    size = gate.double().abs() + 1
    factor = up.double().abs() if gated else 1.0
    # The activations are sums of a few fp32 operations on values of size |x| + 1.
    fp32 = 32 * UNIT[torch.float32]
    out = gated_activation(gate, up, activation=kind)
    assert_within(out, truth.detach(), 2 * UNIT[dtype] * truth.abs() + fp32 * size * factor)
    dgate, dup = gated_activation_backward(dout, gate, up, activation=kind)
    grad = leaves[0].grad
    slack = fp32 * size**3 * dout.double().abs() * factor
    assert_within(dgate, grad, 2 * UNIT[dtype] * grad.abs() + slack + 1e-30, "dgate")
    if gated:
        grad = leaves[1].grad
        slack = fp32 * size * dout.double().abs()
        assert_within(dup, grad, 2 * UNIT[dtype] * grad.abs() + slack + 1e-30, "dup")


def test_halves_of_one_tensor(device):
    both = normal(4, 2 * 1030, device=device)
    gate, up = both[:, :1030], both[:, 1030:]
    expected = gated_activation(gate.contiguous(), up.contiguous(), activation="silu")
    assert torch.equal(gated_activation(gate, up, activation="silu"), expected)
    assert torch.equal(gated_activation(padded(gate), up, activation="silu"), expected)
    dgate, dup = gated_activation_backward(expected, gate, up, activation="silu")
    assert dgate._base is dup._base is not None


def test_far_out_values_do_not_overflow(device):
    x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=device)
    for kind in KINDS:
        out = gated_activation(x, None, activation=kind)
        slope, _ = gated_activation_backward(torch.ones_like(x), x, None, activation=kind)
        assert out.isfinite().all() and out[0, 4] == 1e4 and out[0, 0].abs() == 0
        assert slope.isfinite().all() and slope[0, 4] == 1 and slope[0, 0].abs() == 0


def test_empty_and_bad_input(device):
    x = torch.zeros(0, 4, device=device)
    assert gated_activation(x, x, activation="silu").shape == (0, 4)
    x = torch.zeros(3, 4, device=device)
    with pytest.raises(ValueError, match=r"up: expected shape \(3, 4\), got \(3, 3\)"):
        gated_activation(x, x[:, :3], activation="silu")
    with pytest.raises(ValueError, match="activation: expected one of"):
        gated_activation(x, x, activation="swiglu")
