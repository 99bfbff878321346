"""Seconds of one operation on one GPU: what it computes, what it moves, and what each call costs.

    t = max(flops / (e F), bytes / (b W)) + o

F: the best rate that products of the type were seen to reach (of :class:`Gpu`), W: the memory's
bandwidth; e, b and o are fits (``data/fits/training.toml``): the share of F that products in a model
reach, the share of W that elementwise kernels reach, and the seconds of a call that nothing else
explains (launch, ramp, tail). A product's time is a constant and a line in its FLOPs, so small ones
reach less of F. Flash attention has an e of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from pyparallel.planner.hardware import Gpu
from pyparallel.planner.names import shipped


@dataclass(frozen=True)
class Rates:
    """The fitted constants of a GPU type; five at most.

    Attributes:
        matmul: e of matrix products.
        attention: e of flash attention, forward; backward's is 0.85 of it.
        bandwidth: b.
        op_seconds: o.
        overlap: the share of a communication that could be hidden that is.
    """

    matmul: float = 0.85
    attention: float = 0.6
    bandwidth: float = 0.8
    op_seconds: float = 5e-6
    overlap: float = 0.8


# Backward of flash attention reaches less than its forward: Dao 2023 (FlashAttention-2), figures 4 to 6.
BACKWARD_ATTENTION = 0.85


@cache
def rates_of(gpu: str) -> Rates:
    """The constants of a GPU by the first part of its name ("H100-SXM5-80GB": "H100"); else defaults."""
    known = shipped("fits/training")
    entry = known.get(gpu.partition("-")[0], known["default"])
    names = {field.name for field in fields(Rates)}
    return Rates(**{key: value for key, value in entry.items() if key in names})


def matmul_seconds(m: float, n: float, k: float, gpu: Gpu, rates: Rates, dtype: str) -> float:
    """``[m, k] @ [k, n]`` of ``dtype``, results of 16 bits."""
    if min(m, n, k) <= 0:
        return 0.0
    size = {"fp32": 4.0, "fp8": 1.0, "fp4": 0.5}.get(dtype, 2.0)
    compute = 2 * m * n * k / (rates.matmul * gpu.best_flops(dtype))
    moved = size * (m * k + k * n) + max(2.0, min(size, 4.0)) * m * n
    return max(compute, moved / (rates.bandwidth * gpu.bandwidth)) + rates.op_seconds


def attention_seconds(
    tokens: float, context: float, heads: float, head_dim: int, gpu: Gpu, rates: Rates
) -> float:
    """Flash attention forward: each of ``tokens`` sees ``context`` others on average, 16 bits.

    Causal: context is half of the sequence.
    """
    flops = 4 * tokens * context * heads * head_dim
    return flops / (rates.attention * gpu.best_flops("bf16")) + rates.op_seconds


def attention_backward_seconds(
    tokens: float, context: float, heads: float, head_dim: int, gpu: Gpu, rates: Rates
) -> float:
    """Its backward: five products for forward's two."""
    flops = 10 * tokens * context * heads * head_dim
    rate = BACKWARD_ATTENTION * rates.attention * gpu.best_flops("bf16")
    return flops / rate + rates.op_seconds


def moved_seconds(num_bytes: float, gpu: Gpu, rates: Rates, *, calls: int = 1) -> float:
    """Elementwise work: the bytes that are read and written, by so many kernels."""
    return num_bytes / (rates.bandwidth * gpu.bandwidth) + calls * rates.op_seconds
