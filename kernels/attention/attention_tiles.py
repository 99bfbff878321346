"""What the attention kernels share: which keys a query sees, and how rows are loaded.

S queries, T keys; shift = T - S, so that query i sees keys up to i + shift where causal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyparallel.kernels.language import wide


@triton.jit
def seen_keys(
    offs_m, offs_n, shift, S, T, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BOUNDED: tl.constexpr = True,
):
    """[BLOCK_M, BLOCK_N] True where query offs_m sees key offs_n; shift = T - S. BOUNDED False:
    whatever lies past S and T counts as seen."""
    if BOUNDED:
        seen = (offs_n < T)[None, :] & (offs_m < S)[:, None]
    else:
        seen = tl.full((offs_m.shape[0], offs_n.shape[0]), True, tl.int1)
    behind = offs_m[:, None] + shift - offs_n[None, :]
    if CAUSAL:
        seen = seen & (behind >= 0)
    if WINDOW:
        seen = seen & (behind < window)
    return seen


@triton.jit
def sequence_bounds(cu_ptr, b, length, VARLEN: tl.constexpr):
    """(first token, number of tokens) of sequence b."""
    if VARLEN:
        start = tl.load(cu_ptr + b)
        return start.to(tl.int64), tl.load(cu_ptr + b + 1) - start
    else:
        return tl.full((), 0, tl.int64), length


@triton.jit
def key_runs(
    first, shift, S, T, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(low, full_low, full_high, high): queries first .. first + BLOCK_M see keys in three runs, a
    left and a right edge that the mask cuts, and between them a middle that each sees whole."""
    low = 0
    high = T
    full_low = 0
    full_high = T // BLOCK_N * BLOCK_N
    last = tl.minimum(first + BLOCK_M, S) - 1
    if CAUSAL:
        high = tl.minimum(T, tl.maximum(last + shift + 1, 0))
        full_high = tl.minimum(full_high, tl.maximum(first + shift + 1, 0) // BLOCK_N * BLOCK_N)
    if WINDOW:
        low = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(last + shift - window + 1, 0), BLOCK_N) * BLOCK_N
    full_low = tl.maximum(tl.minimum(full_low, tl.cdiv(high, BLOCK_N) * BLOCK_N), low)
    full_high = tl.maximum(full_high, full_low)
    if MASK != "none":
        # No run of keys is known to be seen whole: all of them are the right edge.
        full_low = low
        full_high = low
    return low, full_low, full_high, high


@triton.jit
def load_rows(
    ptr, first, stride, length, D: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """[BLOCK, BLOCK_D] rows first, first + 1, ... of [length, D], zero outside. MASKED False:
    all BLOCK rows lie inside."""
    lanes = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    # Within a tile 32 bits are enough, and the offsets stay the same in a loop over first.
    ptrs = ptr + wide(first) * stride + (lanes[:, None] * stride + offs_d[None, :])
    if MASKED:
        inside = (first + lanes < length)[:, None] & (offs_d < D)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    elif D == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
