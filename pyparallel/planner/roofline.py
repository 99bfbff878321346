"""Seconds of one operation on one GPU: what it computes, what it moves, and what each call costs.

    t = flops / (e F) + bytes / (b W) + 3 us

F: the best rate that products of the type were seen to reach (of :class:`Gpu`), W: the memory's
bandwidth; e and b are fits (``data/fits/training.toml``): the share of F that products in a model reach,
and of W that elementwise kernels reach. The two are added, not the larger taken: a tile waits for its
first operands and writes its results last, and added they fit both calibrations better. So thin and
small products reach less of F. Flash attention has an e of its own. A layer takes no less than the host
needs to launch it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from pyparallel.planner.hardware import Gpu
from pyparallel.planner.names import shipped


@dataclass(frozen=True)
class Rates:
    """Constants of a GPU type, of which five at most are fitted and the others are these defaults.

    Attributes:
        matmul: e of matrix products.
        attention: e of flash attention, forward; backward's is 0.85 of it.
        bandwidth: b.
        host_s: seconds of the host for one layer's forward, and as much for its backward.
        overlap: the share of a communication that could be hidden that is.
        messages: what a collective takes in a step, of what it takes alone (``collective_seconds``):
            its ranks arrive at different times, and kernels share the memory with it.
    """

    matmul: float = 0.85
    attention: float = 0.6
    bandwidth: float = 0.8
    host_s: float = 4e-4
    overlap: float = 0.8
    messages: float = 1.0


# A kernel's launch and tail on the GPU: aiconfigurator's per-operation latency (hardware.json).
OP_SECONDS = 3e-6
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
    return compute + moved / (rates.bandwidth * gpu.bandwidth) + OP_SECONDS


def attention_seconds(
    tokens: float, context: float, heads: float, head_dim: int, gpu: Gpu, rates: Rates
) -> float:
    """Flash attention forward: each of ``tokens`` sees ``context`` others on average, 16 bits.

    Causal: context is half of the sequence.
    """
    flops = 4 * tokens * context * heads * head_dim
    return flops / (rates.attention * gpu.best_flops("bf16")) + OP_SECONDS


def attention_backward_seconds(
    tokens: float, context: float, heads: float, head_dim: int, gpu: Gpu, rates: Rates
) -> float:
    """Its backward: five products for forward's two."""
    flops = 10 * tokens * context * heads * head_dim
    rate = BACKWARD_ATTENTION * rates.attention * gpu.best_flops("bf16")
    return flops / rate + OP_SECONDS


def moved_seconds(num_bytes: float, gpu: Gpu, rates: Rates, *, calls: int = 1) -> float:
    """Elementwise work: the bytes that are read and written, by so many kernels."""
    return num_bytes / (rates.bandwidth * gpu.bandwidth) + calls * OP_SECONDS
