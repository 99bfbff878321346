"""Gradients of norm.py.

With n = h * rstd (rms_norm) or (h - mean) * rstd (layer_norm), g = dout * weight:

    dh = rstd * (g - n * mean(g * n) - [layer_norm] mean(g)) + dh_after
    dweight = sum over rows of dout * n,   dbias = sum over rows of dout
    dresidual = dh,   dx = dh where dropout kept, / (1 - p), else 0

dh_after [..., H] is what arrives at h from the block's skip connection. Each program sums
dweight over a run of rows; a second kernel adds the programs' sums in order, so the bits
depend on the number of rows only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import ROWS_PER_PROGRAM, WIDE_ROW, row_warps
from pyparallel.kernels.elementwise.dropout import Dropout, check_dropout, dropout_out, global_row
from pyparallel.kernels.language import keep_mask, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    as_rows,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
    next_power_of_two,
)


@triton.jit
def norm_backward_kernel(
    dout_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dh_after_ptr, dh_ptr, dx_ptr,
    dweight_ptr, dbias_ptr, M, H, rows_per_program,
    stride_dm, stride_hm, stride_am, stride_gm, stride_xm,
    seed, keep_threshold, keep_scale, rows_local, rows_global, row_start,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_AFTER: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (programs): program p takes rows p * rows_per_program onwards. WIDE rows
    have no registers to spare: the weight is read again for each row, and its gradient is
    norm_weight_gradient_kernel's."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    cols = tl.arange(0, BLOCK_H)
    mask = cols < H
    if HAS_WEIGHT and not WIDE:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK_H,), tl.float32)
    if HAS_BIAS:
        dbias = tl.zeros((BLOCK_H,), tl.float32)
    for row in range(first, tl.minimum(first + rows_per_program, M)):
        dout = tl.load(dout_ptr + row * stride_dm + cols, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(h_ptr + row * stride_hm + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if CENTER:
            # Past H n is not zero, but dout is.
            n -= tl.load(mean_ptr + row)
        n *= rstd
        if HAS_BIAS:
            dbias += dout
        if HAS_WEIGHT:
            if not WIDE:
                dweight += dout * n
                dout *= weight
            else:
                dout *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dh = dout - n * (tl.sum(dout * n, axis=0) / H)
        if CENTER:
            dh -= tl.sum(dout, axis=0) / H
        dh *= rstd
        if HAS_AFTER:
            after = tl.load(dh_after_ptr + row * stride_am + cols, mask=mask, other=0.0)
            dh += after.to(tl.float32)
        tl.store(dh_ptr + row * stride_gm + cols, narrow(dh, dh_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            index = global_row(row, rows_local, rows_global, row_start) * H + cols
            dx = tl.where(keep_mask(seed, index, keep_threshold), dh * keep_scale, 0.0)
            tl.store(dx_ptr + row * stride_xm + cols, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT and not WIDE:
        tl.store(dweight_ptr + program * H + cols, dweight, mask=mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + program * H + cols, dbias, mask=mask)


@triton.jit
def norm_weight_gradient_kernel(
    dout_ptr, h_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, M, H, rows_per_program,
    stride_dm, stride_hm, CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (programs, tiles of H): the sums of norm_backward_kernel, for wide rows."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = cols < H
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    dbias = tl.zeros((BLOCK_H,), tl.float32)
    for row in range(first, tl.minimum(first + rows_per_program, M)):
        dout = tl.load(dout_ptr + row * stride_dm + cols, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(h_ptr + row * stride_hm + cols, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            n = tl.where(mask, n - tl.load(mean_ptr + row), 0.0)
        dweight += dout * (n * tl.load(rstd_ptr + row))
        dbias += dout
    if HAS_WEIGHT:
        tl.store(dweight_ptr + program * H + cols, dweight, mask=mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + program * H + cols, dbias, mask=mask)


@triton.jit
def column_sum_kernel(
    x_ptr, out_ptr, M, H, stride_xm, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Grid (tiles of H): out [H] (+)= sum over the M rows of x, in fp32, in row order."""
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, M, BLOCK_M):
        mask = (start + rows < M)[:, None] & (cols < H)[None, :]
        x_ptrs = x_ptr + (start + rows)[:, None] * stride_xm + cols[None, :]
        total += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=0)
    if ACCUMULATE:
        result += tl.load(out_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + cols, narrow(result, out_ptr.dtype.element_ty), mask=cols < H)


def column_sum_out(x: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> torch.Tensor:
    """out [H] = (out +) x [M, H].sum(0), accumulated in fp32 and rounded once."""
    check_runnable("column_sum", x, out)
    check_shape("out", out, (x.shape[-1],))
    rows = as_rows("x", x)
    if x.shape[-1]:
        column_sum_kernel[(cdiv(rows.shape[1], 128),)](
            rows, out, rows.shape[0], rows.shape[1], rows.stride(0), ACCUMULATE=accumulate,
            BLOCK_M=16, BLOCK_H=128, num_warps=4,
        )
    return out


class NormGradients(NamedTuple):
    """dx and dresidual [..., H] (one tensor without dropout); dweight, dbias [H]."""

    dx: torch.Tensor
    dresidual: torch.Tensor
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


def norm_backward(
    dout: torch.Tensor, h: torch.Tensor, weight: torch.Tensor | None,
    mean: torch.Tensor | None, rstd: torch.Tensor, *,
    has_bias: bool = False, dh_after: torch.Tensor | None = None, dropout: Dropout | None = None,
) -> NormGradients:
    """Gradients of rms_norm (mean None) or layer_norm from what the forward pass returned."""
    check_runnable("norm_backward", dout, h, weight, mean, rstd, dh_after)
    check_dtype("h", h, FLOATS)
    check_shape("dout", dout, tuple(h.shape))
    grads, rows = as_rows("dout", dout), as_rows("h", h)
    num_rows, width = rows.shape
    after = None
    if dh_after is not None:
        check_shape("dh_after", dh_after, tuple(h.shape))
        after = as_rows("dh_after", dh_after)
    drop = check_dropout(dropout, num_rows)
    dh = torch.empty(num_rows, width, dtype=h.dtype, device=h.device)
    dx = torch.empty_like(dh) if dropout is not None else dh
    programs = cdiv(num_rows, ROWS_PER_PROGRAM)
    block = next_power_of_two(width)
    wide = block > WIDE_ROW
    sums = [
        torch.empty(programs, width, dtype=torch.float32, device=h.device) if wanted else None
        for wanted in (weight is not None, has_bias)
    ]
    if h.numel():
        norm_backward_kernel[(programs,)](
            grads, rows, weight, mean, rstd, after, dh, dx, *sums, num_rows, width,
            ROWS_PER_PROGRAM, grads.stride(0), rows.stride(0),
            after.stride(0) if after is not None else 0, dh.stride(0), dx.stride(0),
            *drop.arguments(), CENTER=mean is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=has_bias and not wide, HAS_AFTER=after is not None,
            DROPOUT=dropout is not None and block < WIDE_ROW, BLOCK_H=block,
            WIDE=wide, num_warps=row_warps(block),
        )
        if block >= WIDE_ROW and dropout is not None:
            dropout_out(dh, dx, dropout=drop)
        if wide and (weight is not None or has_bias):
            norm_weight_gradient_kernel[programs, cdiv(width, 2048)](
                grads, rows, mean, rstd, *sums, num_rows, width, ROWS_PER_PROGRAM,
                grads.stride(0), rows.stride(0), CENTER=mean is not None, HAS_BIAS=has_bias,
                HAS_WEIGHT=weight is not None, BLOCK_H=2048, num_warps=4,
            )
    dtype = weight.dtype if weight is not None else h.dtype
    totals = [
        None if s is None else column_sum_out(
            s, torch.empty(width, dtype=dtype, device=h.device)) for s in sums
    ]
    return NormGradients(dx.view(h.shape), dh.view(h.shape), *totals)
