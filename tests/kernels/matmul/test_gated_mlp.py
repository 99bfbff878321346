import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, integers, normal, rounding_bound, strided

from pyparallel.kernels.elementwise.gated_activation import gated_activation
from pyparallel.kernels.matmul import gated_mlp_descriptor
from pyparallel.kernels.matmul.gated_mlp import gated_mlp, gated_mlp_out
from pyparallel.kernels.matmul.gated_mlp_descriptor import (
    gated_mlp_descriptor_out,
    gated_mlp_on_best_path,
)
from pyparallel.kernels.matmul.matmul import matmul
from tests.bounds import SECOND_ORDER, ULPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 7), (33, 40, 64), (70, 33, 45)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_has_the_bits_of_the_plain_path(dtype, shape, activation, device):
    m, f, k = shape
    x = integers(m, k, dtype=dtype, device=device)
    w = integers(2 * f, k, dtype=dtype, device=device) * 2.0**-4
    gate_up = torch.empty(m, 2 * f, dtype=dtype, device=device)
    out = torch.empty(m, f, dtype=dtype, device=device)
    gated_mlp_out(x, w, out, activation=activation, gate_up=gate_up)
    plain = matmul(x, w)
    assert torch.equal(gate_up, plain)
    assert torch.equal(out, gated_activation(plain[:, :f], plain[:, f:], activation=activation))
    assert torch.equal(out, gated_mlp(strided(x), w, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (33, 40, 64), (70, 72, 104)])
def test_descriptors_have_the_bits_of_pointers(dtype, shape, device):
    m, f, k = shape
    if device != "cpu" and dtype == torch.float32:
        pytest.skip("descriptors have no configuration for 4-byte operands")
    x = integers(m, k, dtype=dtype, device=device)
    w = integers(2 * f, k, dtype=dtype, device=device) * 2.0**-4
    want_both = torch.empty(m, 2 * f, dtype=dtype, device=device)
    want = torch.empty(m, f, dtype=dtype, device=device)
    gated_mlp_out(x, w, want, activation="silu", gate_up=want_both)
    both, out = torch.empty_like(want_both), torch.empty_like(want)
    gated_mlp_descriptor_out(x, w, out, activation="silu", gate_up=both)
    assert torch.equal(both, want_both) and torch.equal(out, want)
    out.fill_(float("nan"))
    assert torch.equal(gated_mlp_descriptor_out(x, w, out, activation="silu"), want)


def test_best_path(monkeypatch, device):
    """Descriptors where they pay and can move the operands, pointers elsewhere."""
    taken = []
    for name in ("gated_mlp_descriptor_out", "gated_mlp_out"):
        run = lambda *a, name=name, **k: taken.append(name)  # noqa: E731
        monkeypatch.setattr(gated_mlp_descriptor, name, run)
    x, w = torch.zeros(300, 64).bfloat16().to(device), torch.zeros(96, 64).bfloat16().to(device)
    for pays in (True, False):
        monkeypatch.setattr(gated_mlp_descriptor, "descriptors_pay", lambda *a, p=pays: p)
        gated_mlp_on_best_path(x, w, activation="silu")
    monkeypatch.setattr(gated_mlp_descriptor, "descriptors_pay", lambda *a: True)
    gated_mlp_on_best_path(strided(x), w, activation="silu")
    gated_mlp_on_best_path(x, w[:94], activation="silu")
    assert taken == ["gated_mlp_descriptor_out"] + ["gated_mlp_out"] * 3


def test_random_values_are_near_the_truth(device):
    x, w = normal(20, 50, device=device), normal(60, 50, device=device)
    both, sizes = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    errors = rounding_bound(both, x.dtype, sizes, 50)
    (gate, up), (of_gate, of_up) = both.split(30, 1), errors.split(30, 1)
    silu, unit = torch.nn.functional.silu(gate), UNIT[x.dtype]
    # |silu'| < 1.1. exp(-g) errs by ULPS and by its argument's two roundings, and so does the sigmoid;
    # a sum, a quotient and a product follow.
    of_silu = 1.1 * of_gate + silu.abs() * (ULPS + 2 * gate.abs() + 3) * unit
    bound = of_silu * up.abs() + silu.abs() * of_up + 2 * unit * (silu * up).abs()
    assert_within(gated_mlp(x, w, activation="silu"), silu * up, SECOND_ORDER * bound)


def test_empty_and_bad_input(device):
    x = torch.zeros(0, 4, device=device)
    assert gated_mlp(x, torch.zeros(6, 4, device=device), activation="silu").shape == (0, 3)
    with pytest.raises(ValueError, match=r"w_gate_up: expected \[2F, K\]"):
        gated_mlp(x, torch.zeros(5, 4, device=device), activation="silu")
