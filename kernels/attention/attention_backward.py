"""Gradients of flash attention (Dao, 2023, FlashAttention-2, algorithm 2), without atomics.

With p = exp(scale * q k^T - lse), delta = sum_d do * o - dlse:

    dv = p^T do,   dp = do v^T,   ds = p * (dp - delta),
    dq = scale * ds k,   dk = scale * ds^T q

One pass (attention_backward_kv.py) holds a tile of keys and walks the queries of every query head
of its group; a second pass holds a tile of queries and walks the keys. Each recomputes p. dlse
[B, N, S] is what arrives at lse where context parallelism merges partial results. Layouts and
masks as in attention.py; the mask gets no gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pyparallel.kernels.attention.attention import check_attention
from pyparallel.kernels.attention.attention_backward_kv import attention_backward_kv_kernel
from pyparallel.kernels.attention.attention_configurations import attention_config
from pyparallel.kernels.attention.attention_mask import apply_mask, mask_arguments, mask_places
from pyparallel.kernels.attention.attention_tiles import (
    key_runs,
    load_rows,
    seen_keys,
    sequence_bounds,
)
from pyparallel.kernels.language import LOG2_E, dot, narrow
from pyparallel.kernels.launch import (
    architecture,
    cdiv,
    check_last_contiguous,
    check_shape,
    next_power_of_two,
)


@triton.jit
def attention_delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, base_ptr, S, stride_ob, stride_os, stride_on,
    stride_db, stride_ds, stride_dn, stride_lb, stride_ln,
    D: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (tiles of S, N, B): delta [B, N, S] = sum over D of do * o, minus dlse; base [B, N, S] =
    lse in log2 units, 0 where a query sees no key and lse is -inf."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m < S
    mask = rows[:, None] & (offs_d < D)[None, :]
    o_ptrs = o_ptr + b * stride_ob + offs_m[:, None] * stride_os + head * stride_on
    do_ptrs = do_ptr + b * stride_db + offs_m[:, None] * stride_ds + head * stride_dn
    o = tl.load(o_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, axis=1)
    place = b * stride_lb + head * stride_ln + offs_m
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + place, mask=rows, other=0.0)
    lse = tl.load(lse_ptr + place, mask=rows, other=0.0)
    tl.store(delta_ptr + place, delta, mask=rows)
    tl.store(base_ptr + place, tl.where(lse == float("-inf"), 0.0, lse * LOG2_E), mask=rows)


@triton.jit
def gather_keys(
    dq, q, do, base, delta, k_ptr, v_ptr, mask_ptr, offs_m, start, stop, shift, S, T, window,
    scale_log2, stride_ks, stride_vs, stride_ms, stride_mt, D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Add what keys start .. stop give to dq / scale of a block of queries; MASKED as in
    attend_keys."""
    zeros = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        k = load_rows(k_ptr, n, stride_ks, T, D, MASKED, BLOCK_N, BLOCK_D)
        v = load_rows(v_ptr, n, stride_vs, T, D, MASKED, BLOCK_N, BLOCK_D)
        scores = dot(q, tl.trans(k), zeros, PRECISION) * scale_log2
        dp = dot(do, tl.trans(v), zeros, PRECISION)
        if MASKED:
            offs_n = n + tl.arange(0, BLOCK_N)
            seen = seen_keys(offs_m, offs_n, shift, S, T, window, CAUSAL, WINDOW)
            if MASK != "none":
                places = mask_places(mask_ptr, offs_m, offs_n, stride_ms, stride_mt)
                scores, seen = apply_mask(scores, seen, places, MASK)
            p = tl.where(seen, tl.exp2(scores - base[:, None]), 0.0)
        else:
            p = tl.exp2(scores - base[:, None])
        ds = p * (dp - delta[:, None])
        dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def attention_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, base_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, mask_ptr,
    S, T, N, G, window, scale, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, stride_ob, stride_os, stride_on,
    stride_gb, stride_gs, stride_gn, stride_lb, stride_ln,
    stride_mb, stride_mn, stride_ms, stride_mt,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (N, B or sequences, tiles of S), the longest rows first."""
    head = tl.program_id(0)
    b = tl.program_id(1)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    q_first, num_queries = sequence_bounds(cu_q_ptr, b, S, VARLEN)
    k_first, num_keys = sequence_bounds(cu_k_ptr, b, T, VARLEN)
    if first >= num_queries:
        return
    batch = tl.where(VARLEN, 0, b).to(tl.int64)
    kv_head = head * G // N
    shift = num_keys - num_queries
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m < num_queries
    q_ptr += batch * stride_qb + q_first * stride_qs + head * stride_qn
    do_ptr += batch * stride_ob + q_first * stride_os + head * stride_on
    k_ptr += batch * stride_kb + k_first * stride_ks + kv_head * stride_kg
    v_ptr += batch * stride_vb + k_first * stride_vs + kv_head * stride_vg
    q = load_rows(q_ptr, first, stride_qs, num_queries, D, True, BLOCK_M, BLOCK_D)
    do = load_rows(do_ptr, first, stride_os, num_queries, D, True, BLOCK_M, BLOCK_D)
    row = batch * stride_lb + head.to(tl.int64) * stride_ln + q_first
    base = tl.load(base_ptr + row + offs_m, mask=rows, other=0.0)
    delta = tl.load(delta_ptr + row + offs_m, mask=rows, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if MASK != "none":
        mask_ptr += batch * stride_mb + head.to(tl.int64) * stride_mn

    low, full_low, full_high, high = key_runs(
        first, shift, num_queries, num_keys, window, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N
    )
    if WINDOW and MASK == "none":
        dq = gather_keys(
            dq, q, do, base, delta, k_ptr, v_ptr, mask_ptr, offs_m, low, full_low, shift,
            num_queries, num_keys, window, scale * LOG2_E, stride_ks, stride_vs, stride_ms,
            stride_mt, D, CAUSAL, WINDOW, MASK, True, PRECISION, BLOCK_N, BLOCK_D,
        )
    if MASK == "none":
        dq = gather_keys(
            dq, q, do, base, delta, k_ptr, v_ptr, mask_ptr, offs_m, full_low, full_high, shift,
            num_queries, num_keys, window, scale * LOG2_E, stride_ks, stride_vs, stride_ms,
            stride_mt, D, CAUSAL, WINDOW, MASK, False, PRECISION, BLOCK_N, BLOCK_D,
        )
    dq = gather_keys(
        dq, q, do, base, delta, k_ptr, v_ptr, mask_ptr, offs_m, full_high, high, shift,
        num_queries, num_keys, window, scale * LOG2_E, stride_ks, stride_vs, stride_ms,
        stride_mt, D, CAUSAL, WINDOW, MASK, True, PRECISION, BLOCK_N, BLOCK_D,
    )
    place = batch * stride_gb + q_first * stride_gs + head * stride_gn
    dq_ptrs = dq_ptr + place + offs_m[:, None].to(tl.int64) * stride_gs + offs_d[None, :]
    dq_mask = rows[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptrs, narrow(dq * scale, dq_ptr.dtype.element_ty), mask=dq_mask)


def attention_backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    lse: torch.Tensor, *, dlse: torch.Tensor | None = None, causal: bool = False,
    window: int | None = None, scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    mask: torch.Tensor | None = None, precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [B, S, N, D], dk, dv [B, T, G, D]) from what attention() took and returned."""
    check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, window)
    b, s, n, d = q.shape
    t, g = k.shape[1:3]
    for name, tensor in (("do", do), ("o", o)):
        check_shape(name, tensor, (b, s, n, d))
        check_last_contiguous(name, tensor)
    check_shape("lse", lse, (b, n, s))
    lse = lse.contiguous()
    if dlse is not None:
        check_shape("dlse", dlse, (b, n, s))
        dlse = dlse.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta, base = torch.empty_like(lse), torch.empty_like(lse)
    varlen = cu_seqlens_q is not None
    kind, mask, strides_m = mask_arguments(q, k, mask, varlen)
    sequences = cu_seqlens_q.shape[0] - 1 if varlen else b
    block_d = max(16, next_power_of_two(d))
    scale = 1 / math.sqrt(d) if scale is None else scale
    if q.numel():
        attention_delta_kernel[cdiv(s, 32), n, b](
            o, do, lse, dlse, delta, base, s, *o.stride()[:3], *do.stride()[:3], *lse.stride()[:2],
            D=d, HAS_DLSE=dlse is not None, BLOCK_M=32, BLOCK_D=block_d, num_warps=4,
        )
    shared = dict(
        D=d, CAUSAL=causal, WINDOW=window is not None, VARLEN=varlen, MASK=kind,
        PRECISION=precision, BLOCK_D=block_d,
    )
    sizes = (s, t, n, g, window or 0, scale)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    arch, itemsize = architecture(q), q.element_size()
    if k.numel():
        row = attention_config(arch, "backward_kv", d, itemsize, precision)
        longest = (max_seqlen_k or t) if varlen else t
        attention_backward_kv_kernel[g, sequences, cdiv(longest, row.block_n)](
            q, k, v, do, base, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, mask, *sizes, *strides,
            *dk.stride()[:3], *lse.stride()[:2], *strides_m, BLOCK_M=row.block_m,
            BLOCK_N=row.block_n, num_warps=row.num_warps, num_stages=row.num_stages, **shared,
        )
    if q.numel():
        row = attention_config(arch, "backward_q", d, itemsize, precision)
        longest = (max_seqlen_q or s) if varlen else s
        attention_backward_q_kernel[n, sequences, cdiv(longest, row.block_m)](
            q, k, v, do, base, delta, dq, cu_seqlens_q, cu_seqlens_k, mask, *sizes, *strides,
            *dq.stride()[:3], *lse.stride()[:2], *strides_m, BLOCK_M=row.block_m,
            BLOCK_N=row.block_n, num_warps=row.num_warps, num_stages=row.num_stages, **shared,
        )
    return dq, dk, dv
