"""out = sum over ranks of x @ w^T, + bias, + residual, on every rank: one persistent kernel.

x_shard_k [M, K_r], w_shard_k [N, K_r]; out [M, N].

    one-shot   every rank stores its partial tile in its own symmetric memory and reads
               everybody's: one step, for decode's few rows
    two-shot   a tile has an owner, who is sent the partials, adds them and is read by the
               others: two steps, 2 / R of the bytes

Sums run in rank order in fp32; partials travel in x's dtype and the sum is rounded before bias
and residual are added, so the bits are those of matmul followed by all_reduce. All tiles are
multiplied and flagged before the first wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.collective.collectives import ONE_SHOT_BYTES
from pyparallel.kernels.collective.symmetric import (
    SymmetricMemory,
    enter,
    leave,
    region_data,
    signal,
    signal_peers,
    wait,
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
def add_rounded(
    total, bias_ptr, residual_ptr, offs, offs_n, mask, N, dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """The rounded sum, + bias and residual and rounded again where there are any."""
    value = narrow(total, dtype)
    if HAS_BIAS or HAS_RESIDUAL:
        total = value.to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            total += bias.to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        value = narrow(total, dtype)
    return value


@triton.jit
def part_of_tile(
    tile, part, M, N, tiles_m, tiles_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_M: tl.constexpr, GROUP_M: tl.constexpr,
):
    """(offsets [SUM_M, BLOCK_N], columns, mask) of rows part .. part + SUM_M of a tile."""
    tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
    offs_m = wide(tile_m) * BLOCK_M + part + tl.arange(0, SUM_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    return offs_m[:, None] * N + offs_n[None, :], offs_n, mask


@triton.jit
def matmul_all_reduce_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, addresses_ptr, state_ptr, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, capacity, timeout_ns, rank,
    R: tl.constexpr, TWO_SHOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUM_M: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (programs). Tile t belongs to program t % programs and, two-shot, to rank
    t // programs % R; its place in symmetric memory is [slot of the sender, M, N]."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    slot = wide(M) * N
    for tile in tl.range(program, tiles, programs):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        offs_m = wide(tile_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        acc = accumulate_tile(
            x_ptr, w_ptr, offs_m, offs_n, 0, K, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SWAP, PRECISION,
        )
        offs = offs_m[:, None] * N + offs_n[None, :]
        if TWO_SHOT:
            owner = tile // programs % R
            data = region_data(addresses_ptr, owner, epoch, capacity, out_ptr) + rank * slot
            tl.store(data + offs, narrow(acc, dtype), mask=mask)
            if owner != rank:
                signal(addresses_ptr, owner, epoch, tile * R + rank)
        else:
            data = region_data(addresses_ptr, rank, epoch, capacity, out_ptr)
            tl.store(data + offs, narrow(acc, dtype), mask=mask)
            signal_peers(addresses_ptr, rank, epoch, tile, R)
    for tile in tl.range(program, tiles, programs):
        owner = tile // programs % R
        if owner == rank or not TWO_SHOT:
            for source in range(0, R):
                if source != rank:
                    flag = tile * R + source
                    wait(addresses_ptr, rank, epoch, flag, source, state_ptr, timeout_ns)
            # A few rows at a time: a whole tile's addresses would not fit the registers.
            for part in tl.range(0, BLOCK_M, SUM_M):
                offs, offs_n, mask = part_of_tile(
                    tile, part, M, N, tiles_m, tiles_n, BLOCK_M, BLOCK_N, SUM_M, GROUP_M
                )
                total = tl.zeros((SUM_M, BLOCK_N), tl.float32)
                for source in range(0, R):
                    if TWO_SHOT:
                        data = region_data(addresses_ptr, rank, epoch, capacity, out_ptr)
                        data += source * slot
                    else:
                        data = region_data(addresses_ptr, source, epoch, capacity, out_ptr)
                    total += tl.load(data + offs, mask=mask, other=0.0).to(tl.float32)
                value = add_rounded(
                    total, bias_ptr, residual_ptr, offs, offs_n, mask, N, dtype, HAS_BIAS,
                    HAS_RESIDUAL,
                )
                tl.store(out_ptr + offs, value, mask=mask)
                if TWO_SHOT:
                    # Into the owner's own slot, which it has read.
                    data = region_data(addresses_ptr, rank, epoch, capacity, out_ptr)
                    tl.store(data + rank * slot + offs, value, mask=mask)
            if TWO_SHOT:
                signal_peers(addresses_ptr, rank, epoch, tiles + tile, R)
    if TWO_SHOT:
        for tile in tl.range(program, tiles, programs):
            owner = tile // programs % R
            if owner != rank:
                flag = (tiles + tile) * R + owner
                wait(addresses_ptr, rank, epoch, flag, owner, state_ptr, 2 * timeout_ns)
                data = region_data(addresses_ptr, owner, epoch, capacity, out_ptr) + owner * slot
                for part in tl.range(0, BLOCK_M, SUM_M):
                    offs, offs_n, mask = part_of_tile(
                        tile, part, M, N, tiles_m, tiles_n, BLOCK_M, BLOCK_N, SUM_M, GROUP_M
                    )
                    tl.store(out_ptr + offs, tl.load(data + offs, mask=mask), mask=mask)
    leave(state_ptr, epoch)


def matmul_all_reduce(
    x_shard_k: torch.Tensor, w_shard_k: torch.Tensor, memory: SymmetricMemory, *,
    bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    algorithm: str | None = None, precision: str = "ieee", config: MatmulConfig | None = None,
) -> torch.Tensor:
    """The sum [M, N] on every rank; algorithm: "one_shot", "two_shot" or None (by size)."""
    name = "matmul_all_reduce"
    m, n, k = check_operands(x_shard_k, w_shard_k, False)
    check_runnable(name, x_shard_k, w_shard_k, bias, residual, memory.addresses)
    if bias is not None:
        check_shape("bias", bias, (n,))
    if residual is not None:
        check_shape("residual", residual, (m, n))
        residual = residual.contiguous()
    x = x_shard_k
    num_bytes = m * n * x.element_size()
    if algorithm is None:
        algorithm = "one_shot" if num_bytes <= ONE_SHOT_BYTES or memory.size == 2 else "two_shot"
    if algorithm not in ("one_shot", "two_shot"):
        raise ValueError(f"algorithm: expected one_shot or two_shot, got {algorithm!r}")
    two_shot = algorithm == "two_shot"
    row = config or fused_matmul_config(architecture(x), m, n, k, x.element_size(), precision)
    tiles = cdiv(m, row.block_m) * cdiv(n, row.block_n)
    memory.need(name, num_bytes * (memory.size if two_shot else 1), 2 * tiles * memory.size)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    # Every rank sees the same M and N, so all of them skip an empty call alike.
    if out.numel() == 0:
        return out
    matmul_all_reduce_kernel[(min(num_processors(x), tiles),)](
        x, w_shard_k, bias, residual, out, memory.addresses, memory.state, m, n, k,
        *x.stride(), *w_shard_k.stride(), memory.capacity, memory.timeout_ns, memory.rank,
        R=memory.size, TWO_SHOT=two_shot, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, BLOCK_M=row.block_m, BLOCK_N=row.block_n,
        BLOCK_K=row.block_k, GROUP_M=row.group_m, SUM_M=min(row.block_m, 16),
        EVEN_K=k % row.block_k == 0, SWAP=row.swap, PRECISION=precision,
        num_warps=row.num_warps, num_stages=row.num_stages,
    )
    memory.launched(name)
    return out
