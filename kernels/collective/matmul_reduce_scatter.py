"""out = rows of rank r of sum over ranks of x @ w^T: one persistent kernel.

x_shard_k [M, K_r], w_shard_k [N, K_r]; out [M_r, N], rows cut by counts, uneven or empty. Each
rank multiplies the tiles of rank + 1's rows first and its own last; a tile for a peer is stored
in that peer's symmetric memory, slot of the sender, and flagged. When the own tile is done the
peers' are there: they are added in rank order in fp32 and rounded once. Partials travel in x's
dtype, so out has the bits of matmul followed by reduce_scatter. bias and residual [M_r, N] are
added once, after the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pyparallel.kernels.collective.collectives import check_counts
from pyparallel.kernels.collective.symmetric import (
    SymmetricMemory,
    enter,
    leave,
    region_data,
    signal,
    signal_peers,
    wait,
    wait_peers,
)
from pyparallel.kernels.configurations import MatmulConfig, fused_matmul_config
from pyparallel.kernels.language import grouped_tile, narrow, wide
from pyparallel.kernels.launch import (
    architecture,
    cdiv,
    check_runnable,
    check_shape,
    num_processors,
)
from pyparallel.kernels.matmul.matmul import accumulate_tile, check_operands


@triton.jit
def matmul_reduce_scatter_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, starts_ptr, addresses_ptr, state_ptr,
    M, N, K, most_rows, stride_xm, stride_xk, stride_wn, stride_wk, capacity, timeout_ns, rank,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (programs): program p takes tiles p, p + programs, ... of every rank's rows."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Flags 0 .. R: who entered; a rank without rows must not run ahead of its peers.
    if program == 0:
        signal_peers(addresses_ptr, rank, epoch, 0, R)
    for step in range(1, R + 1):
        owner = (rank + step) % R
        start = tl.load(starts_ptr + owner)
        rows = (tl.load(starts_ptr + owner + 1) - start).to(tl.int32)
        tiles_m = tl.cdiv(rows, BLOCK_M)
        data = region_data(addresses_ptr, owner, epoch, capacity, out_ptr)
        for tile in tl.range(program, tiles_m * tiles_n, programs):
            tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
            offs_m = wide(tile_m) * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
            acc = accumulate_tile(
                x_ptr + start * stride_xm, w_ptr, offs_m, offs_n, 0, K, rows, N,
                stride_xm, stride_xk, stride_wn, stride_wk,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SWAP, PRECISION,
            )
            partial = narrow(acc, out_ptr.dtype.element_ty)
            offs = offs_m[:, None] * N + offs_n[None, :]
            slot = wide(most_rows) * N
            if step < R:
                tl.store(data + rank * slot + offs, partial, mask=mask)
                signal(addresses_ptr, owner, epoch, (tile + 1) * R + rank)
            else:
                total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for source in range(0, R):
                    if source == rank:
                        total += partial.to(tl.float32)
                    else:
                        flag = (tile + 1) * R + source
                        wait(addresses_ptr, rank, epoch, flag, source, state_ptr, timeout_ns)
                        theirs = tl.load(data + source * slot + offs, mask=mask, other=0.0)
                        total += theirs.to(tl.float32)
                value = narrow(total, out_ptr.dtype.element_ty)
                if HAS_BIAS or HAS_RESIDUAL:
                    # The plain path rounds the sum before it adds.
                    total = value.to(tl.float32)
                    if HAS_BIAS:
                        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
                        total += bias.to(tl.float32)[None, :]
                    if HAS_RESIDUAL:
                        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
                        total += residual.to(tl.float32)
                    value = narrow(total, out_ptr.dtype.element_ty)
                tl.store(out_ptr + offs, value, mask=mask)
    if program == 0:
        wait_peers(addresses_ptr, rank, epoch, 0, state_ptr, timeout_ns, R)
    leave(state_ptr, epoch)


def matmul_reduce_scatter(
    x_shard_k: torch.Tensor, w_shard_k: torch.Tensor, memory: SymmetricMemory, *,
    counts: Sequence[int] | None = None, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, precision: str = "ieee",
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """This rank's rows [M_r, N] of the sum; counts: rows of every rank (None: equal)."""
    name = "matmul_reduce_scatter"
    m, n, k = check_operands(x_shard_k, w_shard_k, False)
    check_runnable(name, x_shard_k, w_shard_k, bias, residual, memory.addresses)
    sizes = check_counts(counts, memory.size, m)
    rows = sizes[memory.rank]
    if bias is not None:
        check_shape("bias", bias, (n,))
    if residual is not None:
        check_shape("residual", residual, (rows, n))
        residual = residual.contiguous()
    x = x_shard_k
    row = config or fused_matmul_config(architecture(x), m, n, k, x.element_size(), precision)
    tiles = cdiv(max(sizes), row.block_m) * cdiv(n, row.block_n)
    slots = memory.size * max(sizes) * n * x.element_size()
    memory.need(name, slots, (tiles + 1) * memory.size)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    matmul_reduce_scatter_kernel[(num_processors(x),)](
        x, w_shard_k, bias, residual, out, memory.starts(sizes), memory.addresses, memory.state,
        m, n, k, max(sizes), *x.stride(), *w_shard_k.stride(), memory.capacity, memory.timeout_ns,
        memory.rank, R=memory.size, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
        EVEN_K=k % row.block_k == 0, SWAP=row.swap, PRECISION=precision,
        num_warps=row.num_warps, num_stages=row.num_stages,
    )
    memory.launched(name)
    return out
