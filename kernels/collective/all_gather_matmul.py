"""out = activation(all_gather(x) @ w^T + bias): one persistent kernel.

x_shard_m [M_r, K] is this rank's rows (its sequence shard, uneven or empty), w_shard_n [N, K]
its columns; out [M, N] and gathered [M, K], M = sum of M_r, rows in rank order. The gathered
rows are kept because the weight gradient wants them.

The first NUM_COPY programs publish the own rows in symmetric memory and fetch the peers',
block of rows by block of rows, raising a local flag after each; the others multiply, the
tiles of the own rows first (they wait for nothing), then those of rank + 1, rank + 2, ...
Every tile is summed over K like matmul's, so out has the bits of matmul(gathered, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

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
from pyparallel.kernels.language import ACTIVATIONS, grouped_tile, narrow, wide
from pyparallel.kernels.launch import (
    architecture,
    cdiv,
    check_runnable,
    check_shape,
    num_processors,
)
from pyparallel.kernels.matmul.matmul import accumulate_tile, check_operands, epilogue

NUM_COPY = 16


@triton.jit
def copy_rows(source_ptr, dest_ptr, row, stop, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """dest[row : row + BLOCK_M] = source[...], rows below stop, both [*, K] contiguous."""
    rows = row + tl.arange(0, BLOCK_M).to(tl.int64)
    for k in tl.range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        mask = (rows < stop)[:, None] & (cols < K)[None, :]
        offs = rows[:, None] * K + cols[None, :]
        tl.store(dest_ptr + offs, tl.load(source_ptr + offs, mask=mask), mask=mask)


@triton.jit
def all_gather_matmul_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, gathered_ptr, starts_ptr, addresses_ptr, state_ptr,
    N, K, most_rows, stride_wn, stride_wk, capacity, timeout_ns, rank,
    R: tl.constexpr, NUM_COPY: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (NUM_COPY + multiplying programs). most_rows: of any shard."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    row_blocks = tl.cdiv(most_rows, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Local flags lie behind the peers' and count (rank of the rows, block of rows).
    local_flags = NUM_COPY * R
    if program < NUM_COPY:
        start = tl.load(starts_ptr + rank)
        own_rows = tl.load(starts_ptr + rank + 1) - start
        own = region_data(addresses_ptr, rank, epoch, capacity, x_ptr)
        for block in tl.range(program, tl.cdiv(own_rows, BLOCK_M), NUM_COPY):
            copy_rows(x_ptr, own, block * BLOCK_M, own_rows, K, BLOCK_M, BLOCK_K)
        signal_peers(addresses_ptr, rank, epoch, program, R)
        for block in tl.range(program, tl.cdiv(own_rows, BLOCK_M), NUM_COPY):
            place = gathered_ptr + start * K
            copy_rows(x_ptr, place, block * BLOCK_M, own_rows, K, BLOCK_M, BLOCK_K)
        for step in range(1, R):
            source = (rank + step) % R
            wait(addresses_ptr, rank, epoch, program * R + source, source, state_ptr, timeout_ns)
            start = tl.load(starts_ptr + source)
            rows = tl.load(starts_ptr + source + 1) - start
            data = region_data(addresses_ptr, source, epoch, capacity, x_ptr)
            for block in tl.range(program, tl.cdiv(rows, BLOCK_M), NUM_COPY):
                place = gathered_ptr + start * K
                copy_rows(data, place, block * BLOCK_M, rows, K, BLOCK_M, BLOCK_K)
                signal(addresses_ptr, rank, epoch, local_flags + source * row_blocks + block)
    else:
        workers = tl.num_programs(0) - NUM_COPY
        # Tiles are numbered through the shards, so a program's share is even over all of them.
        before = 0
        for step in range(0, R):
            source = (rank + step) % R
            start = tl.load(starts_ptr + source)
            rows = (tl.load(starts_ptr + source + 1) - start).to(tl.int32)
            tiles = tl.cdiv(rows, BLOCK_M) * tiles_n
            first = (program - NUM_COPY + workers - before % workers) % workers
            for tile in tl.range(first, tiles, workers):
                tile_m, tile_n = grouped_tile(tile, tl.cdiv(rows, BLOCK_M), tiles_n, GROUP_M)
                if step == 0:
                    a_ptr = x_ptr
                else:
                    a_ptr = gathered_ptr + start * K
                    flag = local_flags + source * row_blocks + tile_m
                    wait(addresses_ptr, rank, epoch, flag, source, state_ptr, 2 * timeout_ns)
                offs_m = wide(tile_m) * BLOCK_M + tl.arange(0, BLOCK_M)
                offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
                acc = accumulate_tile(
                    a_ptr, w_ptr, offs_m, offs_n, 0, K, rows, N, K, 1, stride_wn, stride_wk,
                    BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SWAP, PRECISION,
                )
                mask = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
                acc = epilogue(
                    acc, offs_m, offs_n, mask, bias_ptr, bias_ptr, bias_ptr, bias_ptr, bias_ptr,
                    0, 0, 0, rows, N, False, HAS_BIAS, False, False, ACTIVATION,
                )
                out_ptrs = out_ptr + (start + offs_m)[:, None] * N + offs_n[None, :]
                tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
            before += tiles
    leave(state_ptr, epoch)


def all_gather_matmul(
    x_shard_m: torch.Tensor, w_shard_n: torch.Tensor, memory: SymmetricMemory, *,
    counts: Sequence[int] | None = None, bias: torch.Tensor | None = None,
    activation: str = "none", precision: str = "ieee", config: MatmulConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [M, N], gathered [M, K]); counts: rows of every rank (None: as many as here)."""
    name = "all_gather_matmul"
    rows, n, k = check_operands(x_shard_m, w_shard_n, False)
    check_runnable(name, x_shard_m, w_shard_n, bias, memory.addresses)
    sizes = [rows] * memory.size if counts is None else list(counts)
    if len(sizes) != memory.size or sizes[memory.rank] != rows or min(sizes) < 0:
        raise ValueError(f"counts: expected {memory.size} numbers of rows, {rows} of them at rank "
                         f"{memory.rank}, got {sizes}")
    if bias is not None:
        check_shape("bias", bias, (n,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    x, dtype, device = x_shard_m.contiguous(), x_shard_m.dtype, x_shard_m.device
    most, total = max(sizes), sum(sizes)
    row = config or fused_matmul_config(architecture(x), total, n, k, x.element_size(), precision)
    copiers = 1 if device.type == "cpu" else NUM_COPY
    blocks = cdiv(most, row.block_m)
    memory.need(name, most * k * x.element_size(), memory.size * (copiers + blocks))
    out = torch.empty(total, n, dtype=dtype, device=device)
    gathered = torch.empty(total, k, dtype=dtype, device=device)
    workers = max(1, num_processors(x) - (0 if device.type == "cpu" else copiers))
    all_gather_matmul_kernel[(copiers + workers,)](
        x, w_shard_n, bias, out, gathered, memory.starts(sizes), memory.addresses, memory.state,
        n, k, most, *w_shard_n.stride(), memory.capacity, memory.timeout_ns, memory.rank,
        R=memory.size, NUM_COPY=copiers, HAS_BIAS=bias is not None, ACTIVATION=activation,
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
        EVEN_K=k % row.block_k == 0, SWAP=row.swap, PRECISION=precision,
        num_warps=row.num_warps, num_stages=row.num_stages,
    )
    memory.launched(name)
    return out, gathered
