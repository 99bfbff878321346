"""Device functions that the kernels share: dot, activations, tile order, keep mask.

Legend: M rows, N columns, K summed; BLOCK_* tile sizes, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@triton.jit
def wide(index):
    """index as int64. A loop's index is a plain number in the interpreter: it has no .to()."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] fp32 + a [M, K] @ b [K, N].

    The interpreter multiplies bf16 operands as the integers of their bits, so there (and
    only there) operands are upcast first. PRECISION ("ieee", "tf32", "tf32x3") matters to
    fp32 operands alone.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even. The interpreter truncates to bf16, so there the bits
    are rounded first; NaN passes unchanged."""
    if INTERPRET:
        if dtype == tl.bfloat16 and x.dtype == tl.float32:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(dtype)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh(x) = 1 - 2 / (e^(2x) + 1), with no overflow at either end."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation to fp32 x. gelu is the exact erf form."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """d activate(x) / dx for fp32 x."""
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        return s * (1.0 + x * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def grouped_tile(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (tile_m, tile_n), GROUP_M rows of tiles at a time.

    Tiles in flight together then share few rows of x and columns of w, which keeps both in
    the L2 cache (the order of Triton's matmul tutorial).
    """
    tiles_in_group = GROUP_M * num_tiles_n
    group = tile // tiles_in_group
    first_m = group * GROUP_M
    rows = tl.minimum(num_tiles_m - first_m, GROUP_M)
    within = tile % tiles_in_group
    return first_m + within % rows, within // rows


@triton.jit
def keep_mask(seed, index, keep_threshold):
    """True where dropout keeps the element with this global index.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
    keyed by the seed and counted by the element's index in the whole tensor: a rank that
    holds a shard draws what the dense run draws there. The first of four words is used;
    kept where word < keep_threshold, keep_threshold = (1 - p) * 2^32 as an int64.
    """
    word = tl.randint(seed, index)
    return word.to(tl.uint32, bitcast=True).to(tl.int64) < keep_threshold
