"""out = activation(scale * (x @ w^T) + bias) + residual, accumulated in fp32.

x [M, K], w [N, K] (the layout of nn.Linear; pass a transposed view for [K, N]), bias [N],
residual and out [M, N]; any strides. fp32, fp16, bf16; fp8 operands with fp32 scales
x_scale [M] and w_scale [N]. One program computes one tile [BLOCK_M, BLOCK_N]; every
element is summed over K in one fixed order, so the result does not depend on the grid.

SPLIT_K > 1 (never chosen by itself: smaller tiles were faster wherever it was measured) gives each
split a slab of fp32 partials; a second kernel adds the slabs in split order and applies the
epilogue: still one fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import MatmulConfig, matmul_config
from pyparallel.kernels.language import ACTIVATIONS, activate, dot, grouped_tile, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    FP8,
    architecture,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
)


@triton.jit
def epilogue(
    acc, offs_m, offs_n, mask, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, pre_ptr,
    stride_rm, stride_rn, stride_pm, M, N,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STORE_PRE: tl.constexpr, ACTIVATION: tl.constexpr,
):
    """Scale, bias, activation and residual on an fp32 tile; offs_m is int64."""
    if HAS_SCALE:
        x_scale = tl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)
        w_scale = tl.load(w_scale_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc = acc * x_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if STORE_PRE:
        pre_ptrs = pre_ptr + offs_m[:, None] * stride_pm + offs_n[None, :]
        tl.store(pre_ptrs, narrow(acc, pre_ptr.dtype.element_ty), mask=mask)
    acc = activate(acc, ACTIVATION)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :] * stride_rn
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def accumulate_tile(
    x_ptr, w_ptr, offs_m, offs_n, k_start, k_stop, M, N,
    stride_xm, stride_xk, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """The fp32 tile x[offs_m, k_start:k_stop] @ w[offs_n, k_start:k_stop]^T.

    SWAP multiplies w @ x^T instead, so that a thin x (BLOCK_M < 64) still fills the
    64-row instructions of wgmma and tcgen05.
    """
    offs_k = k_start + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn
    w_ptrs += offs_k[:, None].to(tl.int64) * stride_wk
    m_ok = (offs_m < M)[:, None]
    n_ok = (offs_n < N)[None, :]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(k_start, k_stop, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=m_ok, other=0.0)
            w = tl.load(w_ptrs, mask=n_ok, other=0.0)
        else:
            k_ok = tl.arange(0, BLOCK_K) < k_stop - k
            x = tl.load(x_ptrs, mask=m_ok & k_ok[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=n_ok & k_ok[:, None], other=0.0)
        if SWAP:
            acc = dot(tl.trans(w), tl.trans(x), acc, PRECISION)
        else:
            acc = dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def matmul_kernel(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, pre_ptr,
    M, N, K, k_per_split,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_om, stride_on,
    stride_rm, stride_rn, stride_pm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STORE_PRE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (tiles, splits). With SPLIT out is the slab tensor [splits, M, N] fp32."""
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPLIT:
        k_start = tl.program_id(1) * k_per_split
        k_stop = tl.minimum(k_start + k_per_split, K)
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    else:
        k_start = 0
        k_stop = K
    acc = accumulate_tile(
        x_ptr, w_ptr, offs_m, offs_n, k_start, k_stop, M, N,
        stride_xm, stride_xk, stride_wn, stride_wk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SWAP, PRECISION,
    )
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if not SPLIT:
        acc = epilogue(
            acc, offs_m, offs_n, mask, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr,
            pre_ptr, stride_rm, stride_rn, stride_pm, M, N,
            HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, STORE_PRE, ACTIVATION,
        )
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


# 16 bytes of bf16 a thread, and a short row still has several programs.
SUM_BLOCK, SUM_WARPS = 512, 2


@triton.jit
def split_k_sum_kernel(
    slabs_ptr, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, pre_ptr,
    M, N, stride_om, stride_on, stride_rm, stride_rn, stride_pm,
    BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STORE_PRE: tl.constexpr, ACTIVATION: tl.constexpr,
):
    """Grid (M, tiles of N): add the slabs in split order, then the epilogue."""
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    slab_ptrs = slabs_ptr + offs_m[:, None] * N + offs_n[None, :]
    acc = tl.zeros((1, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(slab_ptrs + tl.full((), split, tl.int64) * M * N, mask=mask, other=0.0)
    acc = epilogue(
        acc, offs_m, offs_n, mask, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, pre_ptr,
        stride_rm, stride_rn, stride_pm, M, N,
        HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, STORE_PRE, ACTIVATION,
    )
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


def check_operands(x: torch.Tensor, w: torch.Tensor, scaled: bool) -> tuple[int, int, int]:
    """(M, N, K) of x [M, K] and w [N, K]; ValueError where they do not fit."""
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"matmul: expected x [M, K] and w [N, K], got {tuple(x.shape)} and "
            f"{tuple(w.shape)}; pass w.T for a [K, N] weight"
        )
    check_dtype("x", x, FLOATS + FP8)
    if x.dtype != w.dtype:
        raise ValueError(f"matmul: expected w of x's dtype {x.dtype}, got {w.dtype}; cast one")
    if scaled and x.dtype not in FP8:
        raise ValueError(f"matmul: scales expect fp8 operands, got {x.dtype}; drop the scales")
    return x.shape[0], w.shape[0], x.shape[1]


def matmul_out(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, *,
    bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", pre_activation: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None, w_scale: torch.Tensor | None = None,
    precision: str = "ieee", split_k: int = 1, config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Write activation(x @ w^T + bias) + residual into out [M, N] and return it.

    pre_activation [M, N], contiguous rows, receives x @ w^T + bias for the backward pass.
    """
    m, n, k = check_operands(x, w, x_scale is not None)
    check_runnable("matmul", x, w, out, bias, residual, pre_activation, x_scale, w_scale)
    check_shape("out", out, (m, n))
    for name, tensor, shape in (
        ("bias", bias, (n,)), ("residual", residual, (m, n)), ("x_scale", x_scale, (m,)),
        ("pre_activation", pre_activation, (m, n)), ("w_scale", w_scale, (n,)),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if (x_scale is None) != (w_scale is None):
        raise ValueError("matmul: expected both of x_scale and w_scale, got one; pass ones")
    if pre_activation is not None and n > 1 and pre_activation.stride(1) != 1:
        raise ValueError("pre_activation: expected contiguous rows; call .contiguous()")
    if split_k < 1:
        raise ValueError(f"split_k: expected at least 1, got {split_k}")
    if m == 0 or n == 0:
        return out
    config = config or matmul_config(architecture(x), m, n, k, x.element_size(), precision)
    strides_r = residual.stride() if residual is not None else (0, 0)
    flags = dict(
        HAS_SCALE=x_scale is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, STORE_PRE=pre_activation is not None,
        ACTIVATION=activation,
    )
    stride_pm = pre_activation.stride(0) if pre_activation is not None else 0
    k_per_split = cdiv(cdiv(k, config.block_k), split_k) * config.block_k
    slabs = out if split_k == 1 else torch.empty(split_k, m, n, dtype=torch.float32, device=x.device)
    stride_om, stride_on = out.stride() if split_k == 1 else (n, 1)
    matmul_kernel[cdiv(m, config.block_m) * cdiv(n, config.block_n), split_k](
        x, w, slabs, x_scale, w_scale, bias, residual, pre_activation, m, n, k, k_per_split,
        *x.stride(), *w.stride(), stride_om, stride_on, *strides_r, stride_pm,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, EVEN_K=k % config.block_k == 0, SWAP=config.swap,
        SPLIT=split_k > 1, PRECISION=precision, num_warps=config.num_warps,
        num_stages=config.num_stages, **flags,
    )
    if split_k > 1:
        split_k_sum_kernel[m, cdiv(n, SUM_BLOCK)](
            slabs, out, x_scale, w_scale, bias, residual, pre_activation, m, n,
            *out.stride(), *strides_r, stride_pm, BLOCK_N=SUM_BLOCK, SPLIT_K=split_k,
            num_warps=SUM_WARPS, **flags,
        )
    return out


def matmul(
    x: torch.Tensor, w: torch.Tensor, *,
    bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None, out_dtype: torch.dtype | None = None,
    precision: str = "ieee", split_k: int = 1,
) -> torch.Tensor:
    """activation(x @ w^T + bias) + residual as a new [M, N] tensor of x's dtype.

    fp8 operands give bf16 unless out_dtype says otherwise.
    """
    m, n, _ = check_operands(x, w, x_scale is not None)
    dtype = out_dtype or (torch.bfloat16 if x.dtype in FP8 else x.dtype)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    return matmul_out(
        x, w, out, bias=bias, residual=residual, activation=activation, x_scale=x_scale,
        w_scale=w_scale, precision=precision, split_k=split_k,
    )
