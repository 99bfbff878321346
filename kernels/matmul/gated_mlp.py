"""out = act(x @ w_gate^T) * (x @ w_up^T): gate and up in one pass over x.

x [M, K]; w_gate_up [2F, K] = [gate rows, up rows], any strides; out [M, F]. One program holds
both accumulators of a tile [BLOCK_M, BLOCK_N], so x is read once and the [M, 2F] intermediate is
never written (unless asked for: gate_up [M, 2F], for the backward pass). gate and up are
rounded to x's dtype before the epilogue, like the plain path does: same bits as matmul followed
by gated_activation, where both multiply by the same instructions (up to 16 rows on sm_90 do not).

The down projection is matmul or, over ranks, matmul_all_reduce or matmul_reduce_scatter; the
gradients are gated_activation_backward and two matmuls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import MatmulConfig, gated_mlp_config
from pyparallel.kernels.language import ACTIVATIONS, activate, dot, grouped_tile, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
)
from pyparallel.kernels.matmul.matmul import check_operands


@triton.jit
def gated_mlp_kernel(
    x_ptr, w_ptr, out_ptr, gate_up_ptr, M, F, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_om, stride_gm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, STORE_GATE_UP: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of M x F)."""
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_N), GROUP_M
    )
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None] * stride_wk
    up_shift = F.to(tl.int64) * stride_wn
    m_ok = (offs_m < M)[:, None]
    n_ok = (offs_n < F)[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=m_ok, other=0.0)
            w_gate = tl.load(w_ptrs, mask=n_ok, other=0.0)
            w_up = tl.load(w_ptrs + up_shift, mask=n_ok, other=0.0)
        else:
            k_ok = offs_k < K - k
            x = tl.load(x_ptrs, mask=m_ok & k_ok[None, :], other=0.0)
            w_gate = tl.load(w_ptrs, mask=n_ok & k_ok[:, None], other=0.0)
            w_up = tl.load(w_ptrs + up_shift, mask=n_ok & k_ok[:, None], other=0.0)
        gate = dot(x, w_gate, gate, PRECISION)
        up = dot(x, w_up, up, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    mask = m_ok & n_ok
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = narrow(gate, dtype)
    up = narrow(up, dtype)
    if STORE_GATE_UP:
        places = gate_up_ptr + offs_m[:, None] * stride_gm + offs_n[None, :]
        tl.store(places, gate, mask=mask)
        tl.store(places + F, up, mask=mask)
    out = activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :]
    tl.store(out_ptrs, narrow(out, dtype), mask=mask)


def check_gated(
    x: torch.Tensor, w_gate_up: torch.Tensor, out: torch.Tensor, gate_up: torch.Tensor | None,
    activation: str,
) -> tuple[int, int, int]:
    """(M, F, K); ValueError where the operands do not fit."""
    m, double, k = check_operands(x, w_gate_up, False)
    check_runnable("gated_mlp", x, w_gate_up, out, gate_up)
    check_dtype("x", x, FLOATS)
    if double % 2:
        raise ValueError(f"w_gate_up: expected [2F, K], got {tuple(w_gate_up.shape)}; "
                         "stack the gate's rows over up's")
    check_shape("out", out, (m, double // 2))
    if gate_up is not None:
        check_shape("gate_up", gate_up, (m, double))
    for name, tensor in (("out", out), ("gate_up", gate_up)):
        if tensor is not None and tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name}: expected contiguous rows; call .contiguous()")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    return m, double // 2, k


def gated_mlp_out(
    x: torch.Tensor, w_gate_up: torch.Tensor, out: torch.Tensor, *, activation: str,
    gate_up: torch.Tensor | None = None, precision: str = "ieee",
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Write act(gate) * up into out [M, F]; gate_up [M, 2F] receives both if given."""
    m, f, k = check_gated(x, w_gate_up, out, gate_up, activation)
    if out.numel() == 0:
        return out
    row = config or gated_mlp_config(architecture(x), m, x.element_size(), precision)
    gated_mlp_kernel[(cdiv(m, row.block_m) * cdiv(f, row.block_n),)](
        x, w_gate_up, out, gate_up, m, f, k, *x.stride(), *w_gate_up.stride(), out.stride(0),
        gate_up.stride(0) if gate_up is not None else 0,
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
        EVEN_K=k % row.block_k == 0, STORE_GATE_UP=gate_up is not None, ACTIVATION=activation,
        PRECISION=precision, num_warps=row.num_warps, num_stages=row.num_stages,
    )
    return out


def gated_mlp(
    x: torch.Tensor, w_gate_up: torch.Tensor, *, activation: str, precision: str = "ieee"
) -> torch.Tensor:
    """act(x @ w_gate^T) * (x @ w_up^T) as a new tensor [M, F]."""
    out = torch.empty(x.shape[0], w_gate_up.shape[0] // 2, dtype=x.dtype, device=x.device)
    return gated_mlp_out(x, w_gate_up, out, activation=activation, precision=precision)
