"""out = activation(x @ w^T + bias) by a persistent kernel that moves tiles with descriptors.

x [M, K] and w [N, K], each contiguous along either axis (16-bit operands; fp8 along K), out
[M, N] with N contiguous, all aligned to 16 bytes: the matmuls of a layer's gradients, too.
On sm_90 and sm_100 a descriptor is a tensor map: one thread asks the copy engine (TMA) for a
whole tile, no registers hold addresses or masks, and edges are filled with zeros. That leaves
room for tiles of 128 x 256, where the pointer kernel spills. Each program walks tiles
program, program + programs, ..., so a tile's stores overlap the next one's loads.

Summed over K in the same order as matmul's tiles: matmul_on_best_path,
which chooses between the two, has one set of bits above FEW_ROWS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pyparallel.kernels.configurations import (
    MatmulConfig,
    descriptor_config,
    descriptors_pay,
    matmul_config,
)
from pyparallel.kernels.language import ACTIVATIONS, activate, dot, grouped_tile, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    FP8,
    architecture,
    check_runnable,
    check_shape,
    num_processors,
)
from pyparallel.kernels.matmul.matmul import check_operands, matmul_out

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def load_rows(desc, row, k, ALONG_K: tl.constexpr):
    """The tile [rows, K] from `row` and `k` on; a descriptor that is not ALONG_K holds [K, rows]."""
    if ALONG_K:
        return desc.load([row, k])
    else:
        return tl.trans(desc.load([k, row]))


@triton.jit
def matmul_descriptor_kernel(
    x_desc, w_desc, out_desc, bias_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    X_ALONG_K: tl.constexpr, W_ALONG_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Grid (programs)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = load_rows(x_desc, tile_m * BLOCK_M, k * BLOCK_K, X_ALONG_K)
            w = load_rows(w_desc, tile_n * BLOCK_N, k * BLOCK_K, W_ALONG_K)
            acc = dot(x, tl.trans(w), acc, PRECISION)
        if HAS_BIAS:
            offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        value = narrow(activate(acc, ACTIVATION), dtype)
        out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], value)


def along_k(operand: torch.Tensor) -> bool:
    """Whether [rows, K] is read along K: unless rows alone are contiguous, in 16-bit types or wider."""
    return operand.stride(-1) == 1 or operand.stride(0) != 1 or operand.dtype in FP8


def lying(operand: torch.Tensor) -> torch.Tensor:
    """The operand as a descriptor sees it: its contiguous axis last."""
    return operand if along_k(operand) else operand.T


def reason_against_descriptors(*tensors: torch.Tensor) -> str | None:
    """None, or why these tensors can't be moved by descriptors, as they lie."""
    for tensor in tensors:
        if tensor.numel() == 0:
            return "an operand is empty"
        if tensor.stride(-1) != 1 or tensor.stride(0) * tensor.element_size() % 16:
            return f"strides {tensor.stride()} are not contiguous rows aligned to 16 bytes"
        if tensor.data_ptr() % 16:
            return "the base is not aligned to 16 bytes"
    return None


def matmul_descriptor_out(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, *, bias: torch.Tensor | None = None,
    activation: str = "none", precision: str = "ieee", config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Write activation(x @ w^T + bias) into out [M, N] and return it."""
    m, n, k = check_operands(x, w, False)
    check_runnable("matmul_descriptor", x, w, out, bias)
    check_shape("out", out, (m, n))
    if bias is not None:
        check_shape("bias", bias, (n,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    reason = reason_against_descriptors(lying(x), lying(w), out)
    if reason:
        raise ValueError(f"matmul_descriptor: {reason}; call matmul")
    row = config or descriptor_config("matmul", architecture(x), m, n, x.element_size())

    def descriptor(operand: torch.Tensor, rows: int) -> TensorDescriptor:
        block = [rows, row.block_k] if along_k(operand) else [row.block_k, rows]
        return TensorDescriptor.from_tensor(lying(operand), block)

    matmul_descriptor_kernel[(min(row.tiles(m, n), num_processors(x)),)](
        descriptor(x, row.block_m), descriptor(w, row.block_n),
        TensorDescriptor.from_tensor(out, [row.block_m, row.block_n]), bias, m, n, k,
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
        X_ALONG_K=along_k(x), W_ALONG_K=along_k(w), HAS_BIAS=bias is not None,
        ACTIVATION=activation, PRECISION=precision, dtype=TRITON_TYPES[out.dtype],
        num_warps=row.num_warps, num_stages=row.num_stages,
    )
    return out


def matmul_descriptor(
    x: torch.Tensor, w: torch.Tensor, *, bias: torch.Tensor | None = None,
    activation: str = "none", precision: str = "ieee", config: MatmulConfig | None = None,
) -> torch.Tensor:
    """activation(x @ w^T + bias) as a new [M, N] tensor; bf16 for fp8 operands."""
    m, n, _ = check_operands(x, w, False)
    dtype = torch.bfloat16 if x.dtype in FP8 else x.dtype
    return matmul_descriptor_out(
        x, w, torch.empty(m, n, dtype=dtype, device=x.device), bias=bias, activation=activation,
        precision=precision, config=config,
    )


def matmul_on_best_path(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None, *,
    bias: torch.Tensor | None = None, activation: str = "none", precision: str = "ieee",
    least_rows: int = 0,
) -> torch.Tensor:
    """matmul_descriptor where the device copies tiles by itself and descriptors pay, else matmul.

    least_rows: choose as for at least so many; a piece of a shard then has the shard's bits.
    """
    m, n, k = check_operands(x, w, False)
    if out is None:
        dtype = torch.bfloat16 if x.dtype in FP8 else x.dtype
        out = torch.empty(m, n, dtype=dtype, device=x.device)
    arch, size = architecture(x), x.element_size()
    m = max(m, least_rows)
    if (
        x.dtype in (*FLOATS[1:], *FP8) and out.dtype in FLOATS[1:]
        and descriptors_pay("matmul", arch, m, n, size)
        and reason_against_descriptors(lying(x), lying(w), out) is None
    ):
        return matmul_descriptor_out(x, w, out, bias=bias, activation=activation)
    row = matmul_config(arch, m, n, k, size, precision)
    return matmul_out(
        x, w, out, bias=bias, activation=activation, precision=precision, config=row
    )
