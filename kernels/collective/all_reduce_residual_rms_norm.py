"""h = residual + sum over ranks of x;  out = rms_norm(h) * weight, in one kernel.

x [M, H] is this rank's partial sum (a row-parallel matmul's output), residual and h [M, H]
are the same on every rank. The sum runs in rank order in fp32; like the plain path it is
rounded to x's dtype before the residual is added, and h before it is normalized, so the bits
are those of all_reduce followed by rms_norm(residual=).

    one-shot   every rank sums and normalizes every row         (R - 1) M H read, 1 step
    two-shot   rank r sums and normalizes its share of the rows, then h and out are read from
               their owners               (R - 1) / R M H summed + twice that read, 2 steps

Two-shot pays when the rows outnumber what one step's latency hides.
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
    signal_peers,
    wait_peers,
)
from pyparallel.kernels.configurations import row_warps
from pyparallel.kernels.language import narrow, wide
from pyparallel.kernels.launch import (
    FLOATS,
    check_dtype,
    check_runnable,
    check_shape,
    next_power_of_two,
    num_processors,
)


@triton.jit
def sum_and_normalize_row(
    addresses_ptr, epoch, capacity, residual_ptr, weight_ptr, row, H, eps,
    R: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """(h, out) of one row, h rounded; both fp32 [BLOCK_H]."""
    cols = tl.arange(0, BLOCK_H)
    mask = cols < H
    total = tl.zeros((BLOCK_H,), tl.float32)
    for r in range(0, R):
        data = region_data(addresses_ptr, r, epoch, capacity, residual_ptr)
        total += tl.load(data + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    residual = tl.load(residual_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    h = narrow(residual + narrow(total, dtype).to(tl.float32), dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
    return h, h * rstd * weight


@triton.jit
def all_reduce_residual_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, h_ptr, out_ptr, addresses_ptr, state_ptr, M, H, eps,
    capacity, timeout_ns, rank, R: tl.constexpr, TWO_SHOT: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Grid (programs): program p takes rows p, p + programs, ...; their owner is row % R."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < H
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    own = region_data(addresses_ptr, rank, epoch, capacity, x_ptr)
    for row in tl.range(program, M, programs):
        offs = wide(row) * H + cols
        tl.store(own + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)
    signal_peers(addresses_ptr, rank, epoch, program, R)
    wait_peers(addresses_ptr, rank, epoch, program, state_ptr, timeout_ns, R)
    if TWO_SHOT:
        # The j-th row of a program belongs to rank j % R. h takes the place of x in the
        # owner's region, which nobody else reads; out lies behind it.
        for row in tl.range(program + rank * programs, M, programs * R):
            offs = wide(row) * H + cols
            h, out = sum_and_normalize_row(
                addresses_ptr, epoch, capacity, residual_ptr, weight_ptr, wide(row), H,
                eps, R, BLOCK_H,
            )
            tl.store(own + offs, narrow(h, dtype), mask=mask)
            tl.store(own + wide(M) * H + offs, narrow(out, dtype), mask=mask)
        signal_peers(addresses_ptr, rank, epoch, programs + program, R)
        wait_peers(addresses_ptr, rank, epoch, programs + program, state_ptr, timeout_ns, R)
        for row in tl.range(program, M, programs):
            owner = region_data(addresses_ptr, row // programs % R, epoch, capacity, x_ptr)
            offs = wide(row) * H + cols
            tl.store(h_ptr + offs, tl.load(owner + offs, mask=mask), mask=mask)
            out = tl.load(owner + wide(M) * H + offs, mask=mask)
            tl.store(out_ptr + offs, out, mask=mask)
    else:
        for row in tl.range(program, M, programs):
            offs = wide(row) * H + cols
            h, out = sum_and_normalize_row(
                addresses_ptr, epoch, capacity, residual_ptr, weight_ptr, wide(row), H,
                eps, R, BLOCK_H,
            )
            tl.store(h_ptr + offs, narrow(h, dtype), mask=mask)
            tl.store(out_ptr + offs, narrow(out, dtype), mask=mask)
    leave(state_ptr, epoch)


def all_reduce_residual_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, memory: SymmetricMemory, *,
    eps: float, algorithm: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, h), both [M, H]; algorithm: "one_shot", "two_shot" or None (by size)."""
    name = "all_reduce_residual_rms_norm"
    check_runnable(name, x, residual, weight, memory.addresses)
    if x.dim() != 2:
        raise ValueError(f"x: expected [M, H], got {tuple(x.shape)}; flatten the tokens")
    rows, width = x.shape
    check_dtype("x", x, FLOATS)
    check_shape("residual", residual, (rows, width))
    check_shape("weight", weight, (width,))
    if residual.dtype != x.dtype:
        raise ValueError(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}; cast it")
    if algorithm is None:
        small = x.numel() * x.element_size() <= ONE_SHOT_BYTES or memory.size == 2
        algorithm = "one_shot" if small else "two_shot"
    if algorithm not in ("one_shot", "two_shot"):
        raise ValueError(f"algorithm: expected one_shot or two_shot, got {algorithm!r}")
    programs = min(num_processors(x), max(1, rows))
    memory.need(name, 2 * x.numel() * x.element_size(), 2 * programs * memory.size)
    out, h = (torch.empty(rows, width, dtype=x.dtype, device=x.device) for _ in "oh")
    block = next_power_of_two(width)
    all_reduce_residual_rms_norm_kernel[(programs,)](
        x.contiguous(), residual.contiguous(), weight, h, out, memory.addresses, memory.state,
        rows, width, eps, memory.capacity, memory.timeout_ns, memory.rank, R=memory.size,
        TWO_SHOT=algorithm == "two_shot", BLOCK_H=block, num_warps=row_warps(block),
    )
    memory.launched(name)
    return out, h
