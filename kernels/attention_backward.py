"""Gradients of flash attention (Dao, 2023, FlashAttention-2, algorithm 2), without atomics.

With p = exp(scale * q k^T - lse), delta = sum_d do * o - dlse:

    dv = p^T do,   dp = do v^T,   ds = p * (dp - delta),
    dq = scale * ds k,   dk = scale * ds^T q

One pass holds a tile of keys and walks the queries of every query head of its group, so dk
and dv of grouped heads are summed in head order in registers; a second pass holds a tile of
queries and walks the keys. Each recomputes p. dlse [B, N, S] is what arrives at lse where
context parallelism merges partial results. Layouts and masks as in attention.py; the mask gets
no gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .attention import check_attention, seen_keys, sequence_bounds
from .attention_configurations import attention_config
from .attention_mask import apply_mask, mask_arguments, mask_places
from .language import LOG2_E, dot, narrow
from .launch import architecture, cdiv, check_last_contiguous, check_shape, next_power_of_two


@triton.jit
def attention_delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, S, stride_ob, stride_os, stride_on,
    stride_db, stride_ds, stride_dn, stride_lb, stride_ln,
    D: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (tiles of S, N, B): delta [B, N, S] = sum over D of do * o, minus dlse."""
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
    tl.store(delta_ptr + place, delta, mask=rows)


@triton.jit
def probabilities(scores, lse, seen):
    """exp2(scores - lse) where seen, else 0; a row that saw nothing has lse = -inf."""
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    return tl.where(seen, tl.exp2(scores - lse), 0.0)


@triton.jit
def attention_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, mask_ptr,
    S, T, N, G, window, scale, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, stride_ob, stride_os, stride_on,
    stride_gb, stride_gs, stride_gg, stride_lb, stride_ln,
    stride_mb, stride_mn, stride_ms, stride_mt,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (tiles of T, G, B or sequences)."""
    first = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    b = tl.program_id(2)
    q_first, num_queries = sequence_bounds(cu_q_ptr, b, S, VARLEN)
    k_first, num_keys = sequence_bounds(cu_k_ptr, b, T, VARLEN)
    if first >= num_keys:
        return
    batch = tl.where(VARLEN, 0, b).to(tl.int64)
    shift = num_keys - num_queries
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    keys_mask = (offs_n < num_keys)[:, None] & (offs_d < D)[None, :]
    k_base = k_ptr + batch * stride_kb + k_first * stride_ks + kv_head * stride_kg
    v_base = v_ptr + batch * stride_vb + k_first * stride_vs + kv_head * stride_vg
    rows_n = offs_n[:, None].to(tl.int64)
    k = tl.load(k_base + rows_n * stride_ks + offs_d[None, :], mask=keys_mask, other=0.0)
    v = tl.load(v_base + rows_n * stride_vs + offs_d[None, :], mask=keys_mask, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    low = 0
    high = num_queries
    if CAUSAL:
        low = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        high = tl.minimum(high, first + BLOCK_N - 1 + window - shift)
    for group in range(0, N // G):
        head = (kv_head * (N // G) + group).to(tl.int64)
        q_base = q_ptr + batch * stride_qb + q_first * stride_qs + head * stride_qn
        do_base = do_ptr + batch * stride_ob + q_first * stride_os + head * stride_on
        row_base = batch * stride_lb + head * stride_ln + q_first
        for m in tl.range(low, high, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            rows = offs_m < num_queries
            mask = rows[:, None] & (offs_d < D)[None, :]
            rows_m = offs_m[:, None].to(tl.int64)
            q = tl.load(q_base + rows_m * stride_qs + offs_d[None, :], mask=mask, other=0.0)
            do = tl.load(do_base + rows_m * stride_os + offs_d[None, :], mask=mask, other=0.0)
            lse = tl.load(lse_ptr + row_base + offs_m, mask=rows, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + row_base + offs_m, mask=rows, other=0.0)
            zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            scores = dot(k, tl.trans(q), zeros, PRECISION) * (scale * LOG2_E)
            seen = tl.trans(
                seen_keys(offs_m, offs_n, shift, num_queries, num_keys, window, CAUSAL, WINDOW)
            )
            if MASK != "none":
                base = mask_ptr + batch * stride_mb + head * stride_mn
                places = mask_places(base, offs_n, offs_m, stride_mt, stride_ms)
                scores, seen = apply_mask(scores, seen, places, MASK)
            p = probabilities(scores, lse[None, :], seen)
            dv = dot(narrow(p, do.dtype), do, dv, PRECISION)
            dp = dot(v, tl.trans(do), zeros, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = dot(narrow(ds, q.dtype), q, dk, PRECISION)
    place = batch * stride_gb + k_first * stride_gs + kv_head * stride_gg
    offsets = place + rows_n * stride_gs + offs_d[None, :]
    tl.store(dk_ptr + offsets, narrow(dk * scale, dk_ptr.dtype.element_ty), mask=keys_mask)
    tl.store(dv_ptr + offsets, narrow(dv, dv_ptr.dtype.element_ty), mask=keys_mask)


@triton.jit
def attention_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, mask_ptr,
    S, T, N, G, window, scale, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, stride_ob, stride_os, stride_on,
    stride_gb, stride_gs, stride_gn, stride_lb, stride_ln,
    stride_mb, stride_mn, stride_ms, stride_mt,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (tiles of S, N, B or sequences)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    b = tl.program_id(2)
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
    mask = rows[:, None] & (offs_d < D)[None, :]
    rows_m = offs_m[:, None].to(tl.int64)
    q_base = q_ptr + batch * stride_qb + q_first * stride_qs + head * stride_qn
    do_base = do_ptr + batch * stride_ob + q_first * stride_os + head * stride_on
    k_base = k_ptr + batch * stride_kb + k_first * stride_ks + kv_head * stride_kg
    v_base = v_ptr + batch * stride_vb + k_first * stride_vs + kv_head * stride_vg
    q = tl.load(q_base + rows_m * stride_qs + offs_d[None, :], mask=mask, other=0.0)
    do = tl.load(do_base + rows_m * stride_os + offs_d[None, :], mask=mask, other=0.0)
    row_base = batch * stride_lb + head.to(tl.int64) * stride_ln + q_first
    lse = tl.load(lse_ptr + row_base + offs_m, mask=rows, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + row_base + offs_m, mask=rows, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if MASK != "none":
        mask_ptr += batch * stride_mb + head.to(tl.int64) * stride_mn

    low = 0
    high = num_keys
    if CAUSAL:
        last = tl.minimum(first + BLOCK_M, num_queries) - 1
        high = tl.minimum(high, tl.maximum(last + shift + 1, 0))
    if WINDOW:
        low = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
    for n in tl.range(low, high, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        keys_mask = (offs_n < num_keys)[:, None] & (offs_d < D)[None, :]
        rows_n = offs_n[:, None].to(tl.int64)
        k = tl.load(k_base + rows_n * stride_ks + offs_d[None, :], mask=keys_mask, other=0.0)
        v = tl.load(v_base + rows_n * stride_vs + offs_d[None, :], mask=keys_mask, other=0.0)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = dot(q, tl.trans(k), zeros, PRECISION) * (scale * LOG2_E)
        seen = seen_keys(offs_m, offs_n, shift, num_queries, num_keys, window, CAUSAL, WINDOW)
        if MASK != "none":
            places = mask_places(mask_ptr, offs_m, offs_n, stride_ms, stride_mt)
            scores, seen = apply_mask(scores, seen, places, MASK)
        p = probabilities(scores, lse[:, None], seen)
        dp = dot(do, tl.trans(v), zeros, PRECISION)
        ds = p * (dp - delta[:, None])
        dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    place = batch * stride_gb + q_first * stride_gs + head * stride_gn
    dq_ptrs = dq_ptr + place + rows_m * stride_gs + offs_d[None, :]
    tl.store(dq_ptrs, narrow(dq * scale, dq_ptr.dtype.element_ty), mask=mask)


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
    delta = torch.empty_like(lse)
    varlen = cu_seqlens_q is not None
    kind, mask, strides_m = mask_arguments(q, k, mask, varlen)
    sequences = cu_seqlens_q.shape[0] - 1 if varlen else b
    block_d = max(16, next_power_of_two(d))
    scale = 1 / math.sqrt(d) if scale is None else scale
    if q.numel():
        attention_delta_kernel[cdiv(s, 32), n, b](
            o, do, dlse, delta, s, *o.stride()[:3], *do.stride()[:3], *lse.stride()[:2],
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
        attention_backward_kv_kernel[cdiv(longest, row.block_n), g, sequences](
            q, k, v, do, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, mask, *sizes, *strides,
            *dk.stride()[:3], *lse.stride()[:2], *strides_m, BLOCK_M=row.block_m,
            BLOCK_N=row.block_n, num_warps=row.num_warps, num_stages=row.num_stages, **shared,
        )
    if q.numel():
        row = attention_config(arch, "backward_q", d, itemsize, precision)
        longest = (max_seqlen_q or s) if varlen else s
        attention_backward_q_kernel[cdiv(longest, row.block_m), n, sequences](
            q, k, v, do, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, mask, *sizes, *strides,
            *dq.stride()[:3], *lse.stride()[:2], *strides_m, BLOCK_M=row.block_m,
            BLOCK_N=row.block_n, num_warps=row.num_warps, num_stages=row.num_stages, **shared,
        )
    return dq, dk, dv
