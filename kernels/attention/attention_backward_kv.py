"""dk and dv of flash attention: a tile of keys walks the queries; equations in attention_backward.py.

dk and dv of grouped heads are summed in registers, in an order that the sizes fix: the run of
queries that the mask cuts on the left of each head, then the middle of each, then the right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyparallel.kernels.attention.attention_mask import apply_mask, mask_places
from pyparallel.kernels.attention.attention_tiles import load_rows, seen_keys, sequence_bounds
from pyparallel.kernels.language import LOG2_E, dot, narrow, wide


@triton.jit
def gather_queries(
    dk, dv, k, v, q_ptr, do_ptr, base_ptr, delta_ptr, mask_ptr, offs_n, start, stop, heads, shift,
    S, T, window, scale_log2, stride_qs, stride_qn, stride_os, stride_on, stride_ln,
    stride_mn, stride_ms, stride_mt, D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Add what queries start .. stop of each head give to (dk / scale, dv) of a block of keys.

    MASKED False: every one of these queries sees every key of the block that there is, and
    stop - start is a multiple of BLOCK_M. Keys past the end are computed and not stored."""
    lanes = tl.arange(0, BLOCK_M)
    zeros = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    # One loop over heads and blocks, so that loads run ahead from one head into the next.
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for step in tl.range(0, heads * blocks):
        head = step // blocks
        m = start + (step - head * blocks) * BLOCK_M
        offs_m = m + lanes
        row = wide(head) * stride_ln + m
        q = load_rows(q_ptr + wide(head) * stride_qn, m, stride_qs, S, D, MASKED, BLOCK_M, BLOCK_D)
        do = load_rows(do_ptr + wide(head) * stride_on, m, stride_os, S, D, MASKED, BLOCK_M, BLOCK_D)
        scores = dot(k, tl.trans(q), zeros, PRECISION) * scale_log2
        dp = dot(v, tl.trans(do), zeros, PRECISION)
        if MASKED:
            # Past the end q, do, base and delta are zero, and so is what they give.
            BOUNDED: tl.constexpr = MASK != "none"
            seen = seen_keys(offs_m, offs_n, shift, S, T, window, CAUSAL, WINDOW, BOUNDED)
            seen = tl.trans(seen)
            if MASK != "none":
                mask_head = mask_ptr + wide(head) * stride_mn
                places = mask_places(mask_head, offs_n, offs_m, stride_mt, stride_ms)
                scores, seen = apply_mask(scores, seen, places, MASK)
            base = tl.load(base_ptr + row + lanes, mask=offs_m < S, other=0.0)
            p = tl.where(seen, tl.exp2(scores - base[None, :]), 0.0)
            delta = tl.load(delta_ptr + row + lanes, mask=offs_m < S, other=0.0)
        else:
            base = tl.load(base_ptr + row + lanes)
            p = tl.exp2(scores - base[None, :])
            delta = tl.load(delta_ptr + row + lanes)
        dv = dot(narrow(p, do.dtype), do, dv, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(narrow(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def attention_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, base_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, mask_ptr,
    S, T, N, G, window, scale, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, stride_ob, stride_os, stride_on,
    stride_gb, stride_gs, stride_gg, stride_lb, stride_ln,
    stride_mb, stride_mn, stride_ms, stride_mt,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (G, B or sequences, tiles of T); the keys that most queries see come first."""
    kv_head = tl.program_id(0)
    b = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_N
    q_first, num_queries = sequence_bounds(cu_q_ptr, b, S, VARLEN)
    k_first, num_keys = sequence_bounds(cu_k_ptr, b, T, VARLEN)
    if first >= num_keys:
        return
    batch = tl.where(VARLEN, 0, b).to(tl.int64)
    shift = num_keys - num_queries
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr += batch * stride_kb + k_first * stride_ks + kv_head * stride_kg
    v_ptr += batch * stride_vb + k_first * stride_vs + kv_head * stride_vg
    k = load_rows(k_ptr, first, stride_ks, num_keys, D, True, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, first, stride_vs, num_keys, D, True, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    heads = N // G
    head = (kv_head * heads).to(tl.int64)
    q_ptr += batch * stride_qb + q_first * stride_qs + head * stride_qn
    do_ptr += batch * stride_ob + q_first * stride_os + head * stride_on
    base_ptr += batch * stride_lb + head * stride_ln + q_first
    delta_ptr += batch * stride_lb + head * stride_ln + q_first
    if MASK != "none":
        mask_ptr += batch * stride_mb + head * stride_mn
    # Queries fall into three runs, as keys do in key_runs.
    low = 0
    high = num_queries
    full_low = 0
    full_high = num_queries // BLOCK_M * BLOCK_M
    if CAUSAL:
        last = tl.minimum(first + BLOCK_N, num_keys) - 1
        low = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        full_low = tl.cdiv(tl.maximum(last - shift, 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        high = tl.minimum(high, first + BLOCK_N - 1 + window - shift)
        full_high = tl.minimum(
            full_high, tl.maximum(first + window - shift, 0) // BLOCK_M * BLOCK_M
        )
    full_low = tl.maximum(tl.minimum(full_low, tl.cdiv(high, BLOCK_M) * BLOCK_M), low)
    full_high = tl.maximum(full_high, full_low)
    if MASK != "none":
        full_low = low
        full_high = low
    if CAUSAL and MASK == "none":
        dk, dv = gather_queries(
            dk, dv, k, v, q_ptr, do_ptr, base_ptr, delta_ptr, mask_ptr, offs_n, low, full_low,
            heads, shift, num_queries, num_keys, window, scale * LOG2_E, stride_qs, stride_qn,
            stride_os, stride_on, stride_ln, stride_mn, stride_ms, stride_mt,
            D, CAUSAL, WINDOW, MASK, True, PRECISION, BLOCK_M, BLOCK_D,
        )
    if MASK == "none":
        dk, dv = gather_queries(
            dk, dv, k, v, q_ptr, do_ptr, base_ptr, delta_ptr, mask_ptr, offs_n, full_low, full_high,
            heads, shift, num_queries, num_keys, window, scale * LOG2_E, stride_qs, stride_qn,
            stride_os, stride_on, stride_ln, stride_mn, stride_ms, stride_mt,
            D, CAUSAL, WINDOW, MASK, False, PRECISION, BLOCK_M, BLOCK_D,
        )
    dk, dv = gather_queries(
        dk, dv, k, v, q_ptr, do_ptr, base_ptr, delta_ptr, mask_ptr, offs_n, full_high, high,
        heads, shift, num_queries, num_keys, window, scale * LOG2_E, stride_qs, stride_qn,
        stride_os, stride_on, stride_ln, stride_mn, stride_ms, stride_mt,
        D, CAUSAL and MASK != "none", WINDOW, MASK, True, PRECISION, BLOCK_M, BLOCK_D,
    )
    rows_n = offs_n[:, None].to(tl.int64)
    keys_mask = (offs_n < num_keys)[:, None] & (offs_d < D)[None, :]
    place = batch * stride_gb + k_first * stride_gs + kv_head * stride_gg
    offsets = place + rows_n * stride_gs + offs_d[None, :]
    tl.store(dk_ptr + offsets, narrow(dk * scale, dk_ptr.dtype.element_ty), mask=keys_mask)
    tl.store(dv_ptr + offsets, narrow(dv, dv_ptr.dtype.element_ty), mask=keys_mask)
