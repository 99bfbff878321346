"""The CPU kernels against the fp32 reference: every instruction set, dtype, odd sizes and addresses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyparallel import _C, backend, reference
from pyparallel.cut.quantize import PackedWeight, quantize_rows
from pyparallel.native.cpu import ops as cpu_ops

ISAS = ["plain", "avx2", "avx512", "avx512_bf16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every instruction set that this processor has."""
    before = _C.isa_in_use()
    if ISAS.index(request.param) > ISAS.index(_C.isa()):
        pytest.skip(f"this processor has {_C.isa()}")
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def unaligned(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random values that begin one element past an aligned address, NaN before and after."""
    count = int(torch.Size(shape).numel())
    memory = torch.full((count + 2,), torch.nan).to(dtype)
    memory[1:-1] = (torch.randn(count) * scale).to(dtype)
    return memory[1:-1].view(shape)


def sum_bound(x: Tensor, weight: Tensor) -> Tensor:
    """How far an fp32 sum of K products in any order may be from the exact one: K eps |x| |w|."""
    return (x.double().abs() @ weight.double().abs().t()) * (x.shape[-1] + 2) * EPS + 1e-30


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


def attention_case(
    B: int, S: int, T: int, G: int, repeats: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values as views of a cache with NaN after the T filled slots."""
    q = unaligned(B, S, G * repeats, D)
    cache = torch.full((2, B, G, T + 3, D), torch.nan, dtype=dtype)
    cache[:, :, :, :T] = torch.randn(2, B, G, T, D).to(dtype)
    k, v = (part[:, :, :T].transpose(1, 2) for part in cache)
    return q, k, v


@pytest.mark.parametrize(
    ("dtype", "window"),
    [
        (torch.float32, None),
        (torch.float32, 1),
        (torch.float32, 37),
        (torch.bfloat16, None),
        (torch.float16, 37),
    ],
)
@pytest.mark.parametrize(
    ("B", "S", "T", "G", "repeats", "D"),
    [
        (1, 1, 1, 1, 1, 64),
        (2, 1, 300, 3, 3, 64),
        (1, 1, 1100, 2, 3, 64),
        (1, 1, 129, 2, 5, 20),
        (1, 1, 77, 1, 8, 128),
        (1, 2, 2, 1, 1, 8),
        (2, 13, 13, 2, 3, 64),
        (1, 97, 200, 1, 2, 80),
        (1, 150, 150, 2, 1, 40),
        (1, 130, 391, 1, 4, 33),
    ],
)
def test_attention(
    B: int, S: int, T: int, G: int, repeats: int, D: int, dtype: torch.dtype, window: int | None
) -> None:
    torch.manual_seed(S * T)
    q, k, v = attention_case(B, S, T, G, repeats, D, dtype)
    o = cpu_ops.attention(q, k, v, causal=True, window=window)
    truth, _ = reference.attention(q.double(), k.double(), v.double(), causal=True, window=window)
    torch.testing.assert_close(o.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_window_over_several_splits_of_the_keys() -> None:
    torch.manual_seed(0)
    q, k, v = attention_case(2, 1, 1100, 2, 3, 64, torch.float32)
    o = cpu_ops.attention(q, k, v, window=600, threads=2)
    truth, _ = reference.attention(q.double(), k.double(), v.double(), window=600)
    torch.testing.assert_close(o.double(), truth, rtol=1e-5, atol=1e-5)


def test_attention_of_large_scores() -> None:
    q, k, v = attention_case(1, 5, 140, 1, 2, 64, torch.float32)
    for factor in (1e3, 1e-3):
        o = cpu_ops.attention(q * factor, k, v)
        truth, _ = reference.attention((q * factor).double(), k.double(), v.double(), causal=True)
        # exp turns an absolute error of a score into a relative one of its weight.
        torch.testing.assert_close(o.double(), truth, rtol=1e-2 if factor > 1 else 1e-5, atol=1e-3)


def test_attention_bits_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    for S in (1, 150):
        q, k, v = attention_case(2, S, 300, 2, 3, 64, torch.float32)
        alone = cpu_ops.attention(q, k, v, threads=1)
        for threads in (2, 3):
            assert torch.equal(cpu_ops.attention(q, k, v, threads=threads), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 64, 577])
def test_norms(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    x, weight, bias = (unaligned(*shape, dtype=dtype) for shape in ((3, 5, n), (n,), (n,)))
    tight = dict(rtol=2e-6, atol=2e-6) if dtype is torch.float32 else {}
    rms = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(cpu_ops.rms_norm(x, weight, 1e-5), rms.to(dtype), **tight)
    for b in (bias, None):
        layer = reference.layer_norm(
            x.double() + 3, weight.double(), None if b is None else b.double(), 1e-5
        )
        shifted = (x.double() + 3).to(dtype)
        if dtype is not torch.float32:
            layer = reference.layer_norm(
                shifted.double(), weight.double(), None if b is None else b.double(), 1e-5
            )
        torch.testing.assert_close(
            cpu_ops.layer_norm(shifted, weight, b, 1e-5),
            layer.to(dtype),
            **(tight and {"rtol": 1e-5, "atol": 1e-5}),
        )


@pytest.mark.parametrize(("D", "half"), [(64, 32), (80, 10), (6, 3), (40, 20)])
def test_rope(D: int, half: int) -> None:
    x, angles = unaligned(2, 7, 3, D), torch.randn(7, half) * 50
    y = cpu_ops.rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(
        y, reference.rope(x, angles.cos(), angles.sin()), rtol=1e-6, atol=1e-6
    )
    batched = angles.expand(2, 7, half)
    assert torch.equal(cpu_ops.rope(x, batched.cos(), batched.sin()), y)


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


def test_bad_calls_say_what_was_expected() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"x: expected \[..., 8\], got \(3, 7\)"):
        cpu_ops.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="thin: expected at most 16 rows, got 17"):
        cpu_ops.linear(torch.randn(17, 8), weight, thin=True)
    with pytest.raises(ValueError, match=r"weight: expected .* a PackedWeight, got torch\.int8"):
        cpu_ops.linear(x, weight.to(torch.int8))
    with pytest.raises(ValueError, match=r"up: expected torch\.float32, got torch\.bfloat16"):
        cpu_ops.linear(x, weight, up=weight.bfloat16())
    with pytest.raises(ValueError, match="residual: expected"):
        cpu_ops.linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="activation: expected one of"):
        cpu_ops.linear(x, weight, activation="tanh")
    with pytest.raises(ValueError, match="attention: expected causal"):
        cpu_ops.attention(*(torch.randn(1, 4, 2, 8),) * 3, causal=False)
    with pytest.raises(ValueError, match="isa: expected 'plain'"):
        _C.use_isa("sse9")


def test_the_table_takes_the_kernels_only_where_no_gradient_is_wanted() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    assert backend.select("linear", x, weight).__module__ != "pyparallel.native.cpu.ops"
    with torch.no_grad():
        assert backend.select("linear", x, weight) is cpu_ops.linear
    with backend.use("cpu"), pytest.raises(backend.UnsupportedError, match="not differentiable"):
        backend.call("linear", x, weight)
