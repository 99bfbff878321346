"""The CPU kernels' attention against fp64: every instruction set, dtype, odd sizes and addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyparallel import reference
from pyparallel.native.cpu import ops as cpu_ops
from tests.native.cpu_cases import unaligned

# Every test runs on every instruction set that this processor has.
pytestmark = pytest.mark.usefixtures("isa")


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
