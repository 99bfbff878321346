"""Dropout whose mask is a function of the element's place in the whole tensor.

    out = residual + where(keep(seed, index), x / (1 - p), 0)

x [..., H] holds rows row_start .. row_start + rows_local of each block of rows_global rows
(a sequence shard [B, S / R, H] of [B, S, H]: rows_local = S / R, rows_global = S), so the
index is the same on every rank count and the mask of a shard is the shard of the mask.
The backward pass is the same function on the gradient, without the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import elementwise_config
from pyparallel.kernels.language import keep_mask, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    as_rows,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
)


@dataclass(frozen=True)
class Dropout:
    """p in [0, 1); seed in 64 bits; which rows of the whole tensor these rows are.

    rows_local and rows_global None: all rows are here, in order."""

    p: float
    seed: int
    rows_local: int | None = None
    rows_global: int | None = None
    row_start: int = 0

    def arguments(self) -> tuple[int, int, float, int, int, int]:
        threshold = round((1.0 - self.p) * 2.0**32)
        scale = 1.0 / (1.0 - self.p) if self.p else 1.0
        rows = (self.rows_local or 1, self.rows_global or 1, self.row_start)
        return (self.seed, threshold, scale, *rows)


def check_dropout(dropout: Dropout | None, num_rows: int) -> Dropout:
    """The given dropout with its rows filled in, or one that keeps everything."""
    if dropout is None:
        return Dropout(0.0, 0)
    if not 0.0 <= dropout.p < 1.0:
        raise ValueError(f"p: expected 0 <= p < 1, got {dropout.p}; p = 1 keeps nothing")
    local = max(num_rows, 1) if dropout.rows_local is None else dropout.rows_local
    whole = local if dropout.rows_global is None else dropout.rows_global
    if local < 1 or num_rows % local or dropout.row_start + local > max(whole, 1):
        raise ValueError(
            f"dropout: expected rows_local dividing {num_rows} rows and row_start + rows_local "
            f"<= rows_global, got {local}, {dropout.row_start}, {whole}"
        )
    return Dropout(dropout.p, dropout.seed, local, whole, dropout.row_start)


@triton.jit
def global_row(row, rows_local, rows_global, row_start):
    """The row of the whole tensor that this shard's row is; row is int64."""
    return row // rows_local * rows_global + row_start + row % rows_local


@triton.jit
def dropout_kernel(
    x_ptr, residual_ptr, out_ptr, H, stride_xm, stride_rm, stride_om,
    seed, keep_threshold, keep_scale, rows_local, rows_global, row_start,
    HAS_RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Grid (M, tiles of H)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = cols < H
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    index = global_row(row, rows_local, rows_global, row_start) * H + cols
    x = tl.where(keep_mask(seed, index, keep_threshold), x * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0)
        x += residual.to(tl.float32)
    tl.store(out_ptr + row * stride_om + cols, narrow(x, out_ptr.dtype.element_ty), mask=mask)


def dropout_out(
    x: torch.Tensor, out: torch.Tensor, *, dropout: Dropout, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Write residual + dropout(x) into out [..., H]; out may be x."""
    check_runnable("dropout", x, out, residual)
    check_dtype("x", x, FLOATS)
    check_shape("out", out, tuple(x.shape))
    rows, dest = as_rows("x", x), as_rows("out", out)
    added = None
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        added = as_rows("residual", residual)
    drop = check_dropout(dropout, rows.shape[0])
    if x.numel() == 0:
        return out
    config = elementwise_config(architecture(x), "stream")
    dropout_kernel[rows.shape[0], cdiv(x.shape[-1], config.block)](
        rows, added, dest, x.shape[-1], rows.stride(0),
        added.stride(0) if added is not None else 0, dest.stride(0), *drop.arguments(),
        HAS_RESIDUAL=added is not None, BLOCK_H=config.block, num_warps=config.num_warps,
    )
    return out


def dropout(
    x: torch.Tensor, *, dropout: Dropout, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + dropout(x) as a new tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dropout_out(x, out, dropout=dropout, residual=residual)
