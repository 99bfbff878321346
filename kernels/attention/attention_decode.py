"""Decode attention: one query token a sequence against a long key/value cache.

    o[b, n] = softmax(scale * q[b, n] k[b, :length[b], g]^T) v[b, :length[b], g]

q, o [B, N, D]; lse [B, N] fp32. Contiguous cache: k, v [B, T, G, D]. Paged cache: k, v
[pages, page_size, G, D] and block_table [B, max_pages] int32: token t of sequence b lies in
page block_table[b, t // page_size]. lengths [B] int32.

The keys are cut into splits, so that a single sequence fills the device (Dao et al., 2023,
"Flash-Decoding"). A program holds all query heads of one key/value head: the cache is read
once and never expanded. A second kernel merges the splits in order; a split's length depends
on the cache and not on the batch or the device, and neither do the bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pyparallel.kernels.attention.attention_configurations import AttentionConfig, attention_config
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

MIN_SPLIT, MAX_SPLITS = 256, 64


@triton.jit
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, part_o_ptr, part_lse_ptr,
    T, N, G, page_size, split_size, window, scale_log2,
    stride_qb, stride_qn, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    stride_tb, D: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (splits, G * tiles of heads, B): part_o [B, N, splits, D], part_lse (log2)."""
    split = tl.program_id(0)
    tiles = tl.cdiv(N // G, BLOCK_H)
    kv_head = tl.program_id(1) // tiles
    b = tl.program_id(2).to(tl.int64)
    within = tl.program_id(1) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * (N // G) + within
    head_ok = within < N // G
    offs_d = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    d_ok = (offs_d < D)[None, :]
    length = tl.minimum(tl.load(lengths_ptr + b), T)
    q_ptrs = q_ptr + b * stride_qb + heads[:, None].to(tl.int64) * stride_qn + offs_d[None, :]
    q = tl.load(q_ptrs, mask=head_ok[:, None] & d_ok, other=0.0)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    low = split * split_size
    high = tl.minimum(low + split_size, length)
    if WINDOW:
        low = tl.maximum(low, (length - window) // BLOCK_N * BLOCK_N)
    for n in tl.range(low, high, BLOCK_N):
        offs_n = n + lanes
        ok = offs_n < high
        if WINDOW:
            ok = ok & (offs_n >= length - window)
        if PAGED:
            page = tl.load(table_ptr + b * stride_tb + offs_n // page_size, mask=ok, other=0)
            k_rows = page.to(tl.int64) * stride_kb + (offs_n % page_size) * stride_ks
            v_rows = page.to(tl.int64) * stride_vb + (offs_n % page_size) * stride_vs
        else:
            k_rows = b * stride_kb + offs_n.to(tl.int64) * stride_ks
            v_rows = b * stride_vb + offs_n.to(tl.int64) * stride_vs
        mask = ok[:, None] & d_ok
        k = tl.load(k_ptr + kv_head * stride_kg + k_rows[:, None] + offs_d[None, :], mask=mask,
                    other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_H, BLOCK_N), tl.float32), PRECISION)
        scores = tl.where(ok[None, :], scores * scale_log2, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + kv_head * stride_vg + v_rows[:, None] + offs_d[None, :], mask=mask,
                    other=0.0)
        acc = dot(narrow(p, v.dtype), v, acc * shrink[:, None], PRECISION)
        maximum = higher
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    lse = tl.where(none, float("-inf"), maximum + tl.log2(tl.where(none, 1.0, total)))
    place = (b * N + heads) * tl.num_programs(0) + split
    tl.store(part_lse_ptr + place, lse, mask=head_ok)
    tl.store(part_o_ptr + place[:, None] * D + offs_d[None, :], acc, mask=head_ok[:, None] & d_ok)


@triton.jit
def attention_merge_kernel(
    part_o_ptr, part_lse_ptr, o_ptr, lse_ptr, N, splits, stride_ob, stride_on,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Grid (N, B): o = sum of part_o * 2^(part_lse - lse), in split order."""
    row = tl.program_id(1).to(tl.int64) * N + tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for split in range(0, splits):
        part_lse = tl.load(part_lse_ptr + row * splits + split)
        part = tl.load(part_o_ptr + (row * splits + split) * D + offs_d, mask=mask, other=0.0)
        higher = tl.maximum(maximum, part_lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(maximum - base)
        weight = tl.exp2(part_lse - base)
        acc = acc * shrink + part * weight
        total = total * shrink + weight
        maximum = higher
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)
    lse = tl.where(none, float("-inf"), (maximum + tl.log2(tl.where(none, 1.0, total))) * LN_2)
    tl.store(lse_ptr + row, lse)
    o_ptrs = o_ptr + tl.program_id(1).to(tl.int64) * stride_ob + tl.program_id(0) * stride_on
    tl.store(o_ptrs + offs_d, narrow(acc, o_ptr.dtype.element_ty), mask=mask)


def split_size_of(capacity: int, block_n: int) -> int:
    """Keys of a split: at least MIN_SPLIT, at most MAX_SPLITS splits, whole blocks."""
    size = max(MIN_SPLIT, cdiv(capacity, MAX_SPLITS))
    return cdiv(size, block_n) * block_n


def attention_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, *,
    block_table: torch.Tensor | None = None, window: int | None = None,
    scale: float | None = None, precision: str = "ieee", split_size: int | None = None,
    config: AttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [B, N, D], lse [B, N]); block_table given: k and v are pages. See the file's top."""
    check_runnable("attention_decode", q, k, v, lengths, block_table)
    check_dtype("q", q, FLOATS)
    if q.dim() != 3 or k.dim() != 4 or q.shape[2] != k.shape[3] or not 1 <= q.shape[2] <= 256:
        raise ValueError(f"attention_decode: expected q [B, N, D] and k [B or pages, T, G, D] with "
                         f"D up to 256, got {tuple(q.shape)} and {tuple(k.shape)}")
    b, n, d = q.shape
    g = k.shape[2]
    check_shape("v", v, tuple(k.shape))
    check_shape("lengths", lengths, (b,))
    check_dtype("lengths", lengths, (torch.int32,))
    if g == 0 or n % g:
        raise ValueError(f"k: expected a number of heads dividing {n}, got {g}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(name, tensor)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}; cast it")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 key, got {window}; None for all")
    page_size = k.shape[1]
    if block_table is None:
        check_shape("k", k, (b, page_size, g, d))
        capacity = page_size
    else:
        check_dtype("block_table", block_table, (torch.int32,))
        check_last_contiguous("block_table", block_table)
        check_shape("block_table", block_table, (b, block_table.shape[-1]))
        capacity = page_size * block_table.shape[1]
    row = config or attention_config(architecture(q), "decode", d, q.element_size(), precision)
    size = split_size or split_size_of(capacity, row.block_n)
    splits = max(1, cdiv(capacity, size))
    o = torch.empty(b, n, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, n, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return o, lse
    part_o = torch.empty(b, n, splits, d, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(b, n, splits, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_two(d))
    attention_decode_kernel[splits, g * cdiv(n // g, row.block_m), b](
        q, k, v, lengths, block_table, part_o, part_lse, capacity, n, g, page_size, size,
        window or 0, (1 / math.sqrt(d) if scale is None else scale) * float(LOG2_E.value),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        block_table.stride(0) if block_table is not None else 0,
        D=d, PAGED=block_table is not None, WINDOW=window is not None, PRECISION=precision,
        BLOCK_H=row.block_m, BLOCK_N=row.block_n, BLOCK_D=block_d,
        num_warps=row.num_warps, num_stages=row.num_stages,
    )
    attention_merge_kernel[n, b](
        part_o, part_lse, o, lse, n, splits, o.stride(0), o.stride(1), D=d, BLOCK_D=block_d,
        num_warps=1,
    )
    return o, lse
