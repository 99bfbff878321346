"""Flash attention, forward (Dao, 2023, FlashAttention-2, algorithm 1).

    o = softmax(scale * q k^T + mask) v,   lse = log sum exp of the scaled, masked scores

q, o [B, S, N, D]; k, v [B, T, G, D]; query head n reads key/value head n * G // N, which is
never expanded; lse [B, N, S] fp32, natural log. Causal: the last query stands at the last
key, so query i sees keys up to i + T - S. window: how many keys, its own included, a query
sees. A query that sees no key gives o = 0 and lse = -inf, the neutral element for merging
partial results of context parallelism. mask: see attention_mask.py.

varlen: q [1, total_q, N, D], k, v [1, total_k, G, D] with cu_seqlens [num_sequences + 1]
int32 on both sides; lse [1, N, total_q].

Head sizes that are no power of two (80, 96) are padded to one inside the kernel with masked
loads that never leave the row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pyparallel.kernels.attention.attention_configurations import AttentionConfig, attention_config
from pyparallel.kernels.attention.attention_mask import apply_mask, mask_arguments, mask_places
from pyparallel.kernels.attention.attention_tiles import (
    key_runs,
    load_rows,
    seen_keys,
    sequence_bounds,
)
from pyparallel.kernels.language import LN_2, LOG2_E, dot, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    cdiv,
    check_dtype,
    check_last_contiguous,
    check_runnable,
    check_shape,
    next_power_of_two,
)


@triton.jit
def attend_keys(
    acc, maximum, total, q, k_ptr, v_ptr, mask_ptr, offs_m, start, stop, shift, S, T, window,
    scale_log2, stride_ks, stride_vs, stride_ms, stride_mt, D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Fold keys start .. stop into the running (acc, maximum, total) of a block of queries.

    MASKED False: every query of the block sees every one of these keys, stop - start is a
    multiple of BLOCK_N, and scale_log2 is not negative."""
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        k = load_rows(k_ptr, n, stride_ks, T, D, MASKED, BLOCK_N, BLOCK_D)
        scores = dot(q, tl.trans(k), zeros, PRECISION)
        if MASKED:
            offs_n = n + tl.arange(0, BLOCK_N)
            scores *= scale_log2
            seen = seen_keys(offs_m, offs_n, shift, S, T, window, CAUSAL, WINDOW)
            if MASK != "none":
                places = mask_places(mask_ptr, offs_m, offs_n, stride_ms, stride_mt)
                scores, seen = apply_mask(scores, seen, places, MASK)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, axis=1))
            # A row that has seen no key yet: -inf minus -inf would be NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores - base[:, None])
        else:
            # The maximum alone is scaled, so that a score costs one fused multiply-add.
            higher = tl.maximum(maximum, tl.max(scores, axis=1) * scale_log2)
            base = higher
            p = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        v = load_rows(v_ptr, n, stride_vs, T, D, MASKED, BLOCK_N, BLOCK_D)
        acc = dot(narrow(p, v.dtype), v, acc, PRECISION)
        maximum = higher
    return acc, maximum, total


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, mask_ptr,
    S, T, N, G, window, scale_log2,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, stride_ob, stride_os, stride_on, stride_lb, stride_ln,
    stride_mb, stride_mn, stride_ms, stride_mt,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (N, B or sequences, tiles of S). The longest rows of a causal mask start first, of all
    heads, so that the last programs to start are short."""
    head = tl.program_id(0)
    b = tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    q_first, num_queries = sequence_bounds(cu_q_ptr, b, S, VARLEN)
    k_first, num_keys = sequence_bounds(cu_k_ptr, b, T, VARLEN)
    first = tile * BLOCK_M
    if first >= num_queries:
        return
    batch = tl.where(VARLEN, 0, b).to(tl.int64)
    kv_head = head * G // N
    q_ptr += batch * stride_qb + q_first * stride_qs + head * stride_qn
    k_ptr += batch * stride_kb + k_first * stride_ks + kv_head * stride_kg
    v_ptr += batch * stride_vb + k_first * stride_vs + kv_head * stride_vg
    o_ptr += batch * stride_ob + q_first * stride_os + head * stride_on
    lse_ptr += batch * stride_lb + head.to(tl.int64) * stride_ln + q_first
    if MASK != "none":
        mask_ptr += batch * stride_mb + head.to(tl.int64) * stride_mn
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m < num_queries
    q = load_rows(q_ptr, first, stride_qs, num_queries, D, True, BLOCK_M, BLOCK_D)
    shift = num_keys - num_queries

    low, full_low, full_high, high = key_runs(
        first, shift, num_queries, num_keys, window, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N
    )
    # A negative scale would make the largest score the smallest.
    full_high = tl.where(scale_log2 < 0.0, full_low, full_high)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if WINDOW and MASK == "none":
        acc, maximum, total = attend_keys(
            acc, maximum, total, q, k_ptr, v_ptr, mask_ptr, offs_m, low,
            tl.minimum(full_low, high), shift, num_queries, num_keys, window, scale_log2,
            stride_ks, stride_vs, stride_ms, stride_mt,
            D, CAUSAL, WINDOW, MASK, True, PRECISION, BLOCK_N, BLOCK_D,
        )
    if MASK == "none":
        acc, maximum, total = attend_keys(
            acc, maximum, total, q, k_ptr, v_ptr, mask_ptr, offs_m, full_low, full_high, shift,
            num_queries, num_keys, window, scale_log2, stride_ks, stride_vs, stride_ms, stride_mt,
            D, CAUSAL, WINDOW, MASK, False, PRECISION, BLOCK_N, BLOCK_D,
        )
    acc, maximum, total = attend_keys(
        acc, maximum, total, q, k_ptr, v_ptr, mask_ptr, offs_m, full_high, high, shift,
        num_queries, num_keys, window, scale_log2, stride_ks, stride_vs, stride_ms, stride_mt,
        D, CAUSAL, WINDOW and MASK != "none", MASK, True, PRECISION, BLOCK_N, BLOCK_D,
    )
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    lse = tl.where(none, float("-inf"), (maximum + tl.log2(tl.where(none, 1.0, total))) * LN_2)
    tl.store(lse_ptr + offs_m, lse, mask=rows)
    o_ptrs = o_ptr + offs_m[:, None].to(tl.int64) * stride_os + offs_d[None, :]
    o_mask = rows[:, None] & (offs_d < D)[None, :]
    tl.store(o_ptrs, narrow(acc, o_ptr.dtype.element_ty), mask=o_mask)


def check_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, window: int | None,
) -> None:
    """ValueError, naming the tensor, unless the shapes, dtypes and strides fit together."""
    check_runnable("attention", q, k, v, cu_seqlens_q, cu_seqlens_k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: expected q [B, S, N, D] and k [B, T, G, D], got "
                         f"{tuple(q.shape)} and {tuple(k.shape)}")
    check_shape("v", v, tuple(k.shape))
    check_dtype("q", q, FLOATS)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(name, tensor)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}; cast it")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: expected a number of heads dividing {q.shape[2]}, got {k.shape[2]}")
    if q.shape[3] > 256 or q.shape[3] < 1:
        raise ValueError(f"q: expected a head size of 1 to 256, got {q.shape[3]}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 key, got {window}; None for all")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens: expected both of cu_seqlens_q and cu_seqlens_k or neither")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor is not None:
            check_dtype(name, tensor, (torch.int32,))
            if q.shape[0] != 1 or tensor.dim() != 1 or tensor.shape != cu_seqlens_q.shape:
                raise ValueError(f"{name}: expected [sequences + 1] beside q [1, total, N, D], got "
                                 f"{tuple(tensor.shape)} beside {tuple(q.shape)}")


def attention_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, *,
    causal: bool = False, window: int | None = None, scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None, mask: torch.Tensor | None = None,
    precision: str = "ieee", config: AttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write o [B, S, N, D] and lse [B, N, S]; max_seqlen_q bounds the grid for varlen."""
    check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, window)
    b, s, n, d = q.shape
    check_shape("o", o, (b, s, n, d))
    check_shape("lse", lse, (b, n, s))
    check_last_contiguous("o", o)
    check_last_contiguous("lse", lse)
    varlen = cu_seqlens_q is not None
    kind, mask, strides_m = mask_arguments(q, k, mask, varlen)
    if q.numel() == 0:
        return o, lse
    sequences = cu_seqlens_q.shape[0] - 1 if varlen else b
    longest = (max_seqlen_q or s) if varlen else s
    config = config or attention_config(architecture(q), "forward", d, q.element_size(), precision)
    attention_kernel[n, sequences, cdiv(longest, config.block_m)](
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, mask, s, k.shape[1], n, k.shape[2], window or 0,
        (1 / math.sqrt(d) if scale is None else scale) * float(LOG2_E.value),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *lse.stride()[:2],
        *strides_m, D=d, CAUSAL=causal, WINDOW=window is not None, VARLEN=varlen, MASK=kind,
        PRECISION=precision, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, next_power_of_two(d)), num_warps=config.num_warps, num_stages=config.num_stages,
    )
    return o, lse


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    causal: bool = False, window: int | None = None, scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None, mask: torch.Tensor | None = None, precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) as new tensors; see the top of the file."""
    b, s, n = q.shape[:3]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, n, s, dtype=torch.float32, device=q.device)
    return attention_out(
        q, k, v, o, lse, causal=causal, window=window, scale=scale, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, mask=mask, precision=precision,
    )
