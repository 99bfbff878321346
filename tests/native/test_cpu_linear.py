"""The CPU kernels' matmuls against fp64: every instruction set, dtype, odd sizes and addresses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyparallel import reference
from pyparallel.cut.quantize import PackedWeight, quantize_rows
from pyparallel.native.cpu import ops as cpu_ops
from tests.native.cpu_cases import DTYPES, EPS, sum_bound, unaligned

# Every test runs on every instruction set that this processor has.
pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 1, 1),
        (1, 33, 205),
        (2, 101, 64),
        (5, 7, 31),
        (13, 64, 576),
        (16, 65, 100),
        (41, 97, 77),
        (19, 9, 0),
    ],
)
def test_linear(M: int, N: int, K: int, thin: bool, dtype: torch.dtype) -> None:
    if thin and M > cpu_ops.MAX_THIN_ROWS:
        thin = False
    torch.manual_seed(M * N + K)
    x, weight, bias = unaligned(M, K), unaligned(N, K, dtype=dtype), unaligned(N)
    y = cpu_ops.linear(x, weight, bias, thin=thin)
    truth = x.double() @ weight.double().t() + bias.double()
    bound = sum_bound(x, weight) + 2 * EPS * (truth.abs() + bias.double().abs())
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("thin", [True, False])
def test_linear_of_small_integers_is_exact(thin: bool) -> None:
    x = torch.randint(-8, 9, (11, 203)).float()
    for dtype in DTYPES:
        weight = torch.randint(-8, 9, (75, 203)).to(dtype)
        y = cpu_ops.linear(x.bfloat16().float(), weight, thin=thin)
        assert torch.equal(y, x @ weight.float().t())


@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_epilogues(activation: str, thin: bool) -> None:
    torch.manual_seed(0)
    M, N, K = 9, 83, 50
    x, gate, up = unaligned(M, K), unaligned(N, K, scale=0.3), unaligned(N, K, scale=0.3)
    bias, up_bias, residual = unaligned(N), unaligned(N), unaligned(M, N)
    y = cpu_ops.linear(
        x, gate, bias, up=up, up_bias=up_bias, activation=activation, residual=residual, thin=thin
    )
    act = reference.ACTIVATIONS[activation]
    x, gate, up = x.double(), gate.double(), up.double()
    truth = act(x @ gate.t() + bias) * (x @ up.t() + up_bias) + residual
    torch.testing.assert_close(y.double(), truth, rtol=2e-5, atol=2e-5)
    alone = cpu_ops.linear(x.float(), gate.float(), activation=activation, thin=thin)
    torch.testing.assert_close(alone.double(), act(x @ gate.t()), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("thin", [True, False])
def test_activations_at_their_ends(thin: bool) -> None:
    x = torch.tensor([[-1e4], [-120.0], [-20.0], [-0.0], [1e-30], [20.0], [120.0], [1e4]])
    one = torch.ones(1, 1)
    for name, function in reference.ACTIVATIONS.items():
        y = cpu_ops.linear(x, one, activation=name, thin=thin)
        torch.testing.assert_close(y, function(x), rtol=1e-6, atol=1e-6)


def test_int8_weights_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 203) * torch.rand(70, 1)
    weight[3] = 0
    data, scale = quantize_rows(weight)
    read = data.double() * scale.double().unsqueeze(1)
    # Half a step, and what fp32 rounds in finding the step.
    assert ((read - weight.double()).abs() <= scale.unsqueeze(1) * (0.5 + 1e-4)).all()
    for M in (1, 7, 40):
        x = torch.randn(M, 203)
        y = cpu_ops.linear(x, PackedWeight(data, "int8", torch.float32, scale))
        assert ((y.double() - x.double() @ read.t()).abs() <= 2 * sum_bound(x, read)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_rows_round_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for M in (3, 40):
        x, weight = torch.randn(M, 300).to(dtype), torch.randn(50, 300).to(dtype)
        y = cpu_ops.linear(x, weight)
        assert y.dtype is dtype
        truth = x.double() @ weight.double().t()
        # The bf16 dot product flushes what is below fp32's normal range; nothing here is.
        bound = truth.abs() * torch.finfo(dtype).eps / 2 + sum_bound(x, weight) * 2
        assert ((y.double() - truth).abs() <= bound).all()


def test_bits_depend_on_neither_rows_nor_threads() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 333)
    for dtype in DTYPES:
        weight = torch.randn(130, 333).to(dtype)
        together = cpu_ops.linear(x, weight, thin=True, threads=1)
        for M in range(1, 16):
            assert torch.equal(cpu_ops.linear(x[:M], weight, thin=True), together[:M])
        assert torch.equal(torch.cat([cpu_ops.linear(r, weight) for r in x.split(1)]), together)
    many = torch.randn(70, 333)
    weight = torch.randn(1000, 333)
    blocked = cpu_ops.linear(many, weight, threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(cpu_ops.linear(many, weight, threads=threads), blocked)
        assert torch.equal(
            cpu_ops.linear(x, weight, threads=threads), cpu_ops.linear(x, weight, threads=1)
        )


@settings(max_examples=25, deadline=None)
@given(
    M=st.integers(1, 60),
    N=st.integers(1, 90),
    K=st.integers(1, 150),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_of_any_shape(M: int, N: int, K: int, gated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, gate = torch.randint(-3, 4, (M, K)).float(), torch.randint(-3, 4, (N, K)).float()
    up = torch.randint(-3, 4, (N, K)).float() if gated else None
    y = cpu_ops.linear(x, gate, up=up, activation="relu")
    truth = (x @ gate.t()).relu()
    assert torch.equal(y, truth * (x @ up.t()) if gated else truth)
