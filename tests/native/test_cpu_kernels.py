"""CPU kernels of a row each, what else there is to check, and what the table takes; see cpu_cases."""

from __future__ import annotations

import pytest
import torch

from pyparallel import _C, backend, reference
from pyparallel.native.cpu import ops as cpu_ops
from tests.native.cpu_cases import DTYPES, unaligned

# Every test runs on every instruction set that this processor has.
pytestmark = pytest.mark.usefixtures("isa")


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
