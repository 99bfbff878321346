"""out = activation(x @ w^T + bias) by a persistent kernel that moves tiles with descriptors.

x [M, K] and w [N, K] with K contiguous, out [M, N] with N contiguous, all aligned to 16 bytes.
On sm_90 and sm_100 a descriptor is a tensor map: one thread asks the copy engine (TMA) for a
whole tile, no registers hold addresses or masks, and edges are filled with zeros. That leaves
room for tiles of 128 x 256, where the pointer kernel spills. Each program walks tiles
program, program + programs, ..., so a tile's stores overlap the next one's loads.

Summed over K in the same order as matmul's tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configurations import MatmulConfig, descriptor_config
from .language import ACTIVATIONS, activate, dot, grouped_tile, narrow
from .launch import FLOATS, FP8, architecture, cdiv, check_runnable, check_shape, num_processors
from .matmul import check_operands


@triton.jit
def matmul_descriptor_kernel(
    x_desc, w_desc, out_desc, bias_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Grid (programs). w_desc has blocks [BLOCK_N, BLOCK_K]."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            w = w_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            acc = dot(x, tl.trans(w), acc, PRECISION)
        if HAS_BIAS:
            offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        value = narrow(activate(acc, ACTIVATION), dtype)
        out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], value)


def reason_against_descriptors(*tensors: torch.Tensor) -> str | None:
    """None, or why these operands can't be moved by descriptors."""
    for tensor in tensors:
        if tensor.numel() == 0:
            return "an operand is empty"
        if tensor.stride(-1) != 1 or tensor.stride(0) * tensor.element_size() % 16:
            return f"strides {tensor.stride()} are not contiguous rows aligned to 16 bytes"
        if tensor.data_ptr() % 16:
            return "the base is not aligned to 16 bytes"
    return None


def matmul_descriptor(
    x: torch.Tensor, w: torch.Tensor, *, bias: torch.Tensor | None = None,
    activation: str = "none", precision: str = "ieee", config: MatmulConfig | None = None,
) -> torch.Tensor:
    """activation(x @ w^T + bias) as a new [M, N] tensor; bf16 for fp8 operands."""
    m, n, _ = check_operands(x, w, False)
    check_runnable("matmul_descriptor", x, w, bias)
    if bias is not None:
        check_shape("bias", bias, (n,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    dtype = torch.bfloat16 if x.dtype in FP8 else x.dtype
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    reason = reason_against_descriptors(x, w, out)
    if reason:
        raise ValueError(f"matmul_descriptor: {reason}; call matmul")
    row = config or descriptor_config(architecture(x), x.element_size())
    tiles = cdiv(m, row.block_m) * cdiv(n, row.block_n)
    matmul_descriptor_kernel[(min(tiles, num_processors(x)),)](
        TensorDescriptor.from_tensor(x, [row.block_m, row.block_k]),
        TensorDescriptor.from_tensor(w, [row.block_n, row.block_k]),
        TensorDescriptor.from_tensor(out, [row.block_m, row.block_n]),
        bias, *x.shape[:1], n, x.shape[1],
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
        HAS_BIAS=bias is not None, ACTIVATION=activation, PRECISION=precision,
        dtype={torch.float32: tl.float32, torch.float16: tl.float16}.get(dtype, tl.bfloat16),
        num_warps=row.num_warps, num_stages=row.num_stages,
    )
    return out


def matmul_on_best_path(
    x: torch.Tensor, w: torch.Tensor, *, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """matmul_descriptor for many aligned rows where the device copies tiles by itself, else
    matmul. Below 65 rows the thin and decode tiles of matmul waste less."""
    from .matmul import matmul

    fits = (
        x.dim() == 2 and w.dim() == 2 and x.shape[0] > 64 and x.dtype in (*FLOATS[1:], *FP8)
        and architecture(x) in ("sm_90", "sm_100")
        and x.shape[1] % (16 // x.element_size()) == 0
        and w.shape[0] % 8 == 0 and reason_against_descriptors(x, w) is None
    )
    run = matmul_descriptor if fits else matmul
    return run(x, w, bias=bias, activation=activation)
