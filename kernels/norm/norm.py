"""RMSNorm and LayerNorm with what usually surrounds them, in one pass over the rows.

    h = residual + dropout(x)            (either part may be absent)
    rms_norm:    out = h * rstd * weight,            rstd = (mean(h^2) + eps)^(-1/2)
    layer_norm:  out = (h - mean) * rstd * weight + bias,  rstd = (var(h) + eps)^(-1/2)

x, residual, out [..., H]; weight, bias [H]; statistics [rows] in fp32. h is rounded to x's
dtype before it is normalized, because that is what the next block reads as its residual.
Variance is the mean of squared deviations (two passes over registers), not E[x^2] - E[x]^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import WIDE_ROW, row_warps
from pyparallel.kernels.elementwise.dropout import Dropout, check_dropout, dropout_out, global_row
from pyparallel.kernels.language import keep_mask, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    as_rows,
    check_dtype,
    check_runnable,
    check_shape,
    next_power_of_two,
)


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, h_ptr, mean_ptr, rstd_ptr,
    M, H, stride_xm, stride_rm, stride_om, stride_hm, eps,
    seed, keep_threshold, keep_scale, rows_local, rows_global, row_start,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, STORE_H: tl.constexpr, STORE_STATS: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Grid (M): one row a program. CENTER subtracts the mean (LayerNorm)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < H
    h = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        index = global_row(row, rows_local, rows_global, row_start) * H + cols
        h = tl.where(keep_mask(seed, index, keep_threshold), h * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0)
        h += residual.to(tl.float32)
    if STORE_H:
        rounded = narrow(h, h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * stride_hm + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if CENTER:
        mean = tl.sum(h, axis=0) / H
        h = tl.where(mask, h - mean, 0.0)
        if STORE_STATS:
            tl.store(mean_ptr + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
    if STORE_STATS:
        tl.store(rstd_ptr + row, rstd)
    out = h * rstd
    if HAS_WEIGHT:
        out *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_om + cols, narrow(out, out_ptr.dtype.element_ty), mask=mask)


class NormResult(NamedTuple):
    """out [..., H]; h [..., H] (x itself when nothing was added); mean, rstd [rows] fp32.

    mean is None for rms_norm."""

    out: torch.Tensor
    h: torch.Tensor
    mean: torch.Tensor | None
    rstd: torch.Tensor


def norm_out(
    x: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor, *,
    center: bool, eps: float, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, h: torch.Tensor | None = None,
    mean: torch.Tensor | None = None, rstd: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Normalize the rows of x [..., H] into out; also write h and the statistics if given."""
    check_runnable("norm", x, weight, out, bias, residual, h, mean, rstd)
    check_dtype("x", x, FLOATS)
    width = x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_shape(name, tensor, (width,))
    for name, tensor in (("out", out), ("residual", residual), ("h", h)):
        if tensor is not None:
            check_shape(name, tensor, tuple(x.shape))
    if h is None and (residual is not None or dropout is not None):
        raise ValueError("h: expected a tensor to hold residual + dropout(x), got None; pass one")
    block = next_power_of_two(width)
    if dropout is not None and h is not None and block > WIDE_ROW:
        x = dropout_out(x, h, dropout=dropout, residual=residual)
        residual = h = dropout = None
    rows = as_rows("x", x)
    dest = as_rows("out", out)
    added = as_rows("residual", residual) if residual is not None else None
    kept = as_rows("h", h) if h is not None else None
    drop = check_dropout(dropout, rows.shape[0])
    if rows.shape[0] == 0 or width == 0:
        return out
    norm_kernel[(rows.shape[0],)](
        rows, added, weight, bias, dest, kept, mean, rstd, rows.shape[0], width,
        rows.stride(0), added.stride(0) if added is not None else 0, dest.stride(0),
        kept.stride(0) if kept is not None else 0, eps, *drop.arguments(),
        CENTER=center, HAS_RESIDUAL=added is not None, HAS_BIAS=bias is not None,
        HAS_WEIGHT=weight is not None, STORE_H=kept is not None, STORE_STATS=rstd is not None,
        DROPOUT=dropout is not None, BLOCK_H=block, num_warps=row_warps(block),
    )
    return out


def _norm(x, weight, bias, eps, residual, dropout, center) -> NormResult:
    num_rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    changed = residual is not None or dropout is not None
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device) if changed else None
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if center else None
    norm_out(x, weight, out, center=center, eps=eps, bias=bias, residual=residual, h=h,
             mean=mean, rstd=rstd, dropout=dropout)
    return NormResult(out, x if h is None else h, mean, rstd)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, *, eps: float,
    residual: torch.Tensor | None = None, dropout: Dropout | None = None,
) -> NormResult:
    """RMSNorm of residual + dropout(x) over the last dimension (Zhang and Sennrich, 2019)."""
    return _norm(x, weight, None, eps, residual, dropout, False)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, eps: float,
    residual: torch.Tensor | None = None, dropout: Dropout | None = None,
) -> NormResult:
    """LayerNorm of residual + dropout(x) over the last dimension (Ba et al., 2016)."""
    return _norm(x, weight, bias, eps, residual, dropout, True)
