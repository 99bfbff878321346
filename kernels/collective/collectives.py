"""all_reduce (one-shot and two-shot), all_gather and reduce_scatter over symmetric memory.

Flat contiguous tensors; parts in rank order, `counts[r]` elements each, uneven or even zero.
Sums run in rank order in fp32 and are rounded once, so one-shot, two-shot and reduce-scatter
agree to the bit, on every rank and in every run. Per rank, n elements over R ranks:

    one-shot        1 step,  (R - 1) n read from peers            small n: latency
    two-shot        2 steps, 2 (R - 1) / R n read from peers      large n: bandwidth
    all-gather      1 step,  the other ranks' parts read
    reduce-scatter  1 step,  (R - 1) times the own part read

Program p moves every num_programs-th block of every part, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl

from pyparallel.kernels.collective.symmetric import (
    SymmetricMemory,
    enter,
    leave,
    region_data,
    signal_peers,
    wait_peers,
)
from pyparallel.kernels.configurations import elementwise_config
from pyparallel.kernels.language import narrow
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
    num_processors,
)

MAX_PROGRAMS = 64
# One-shot up to here: a second step costs more than the bytes that it saves.
ONE_SHOT_BYTES = 256 * 1024


@triton.jit
def edge(starts_ptr, part, ALIGNED: tl.constexpr):
    """First element of a part; ALIGNED: all are multiples of 16, so 128-bit loads are legal."""
    value = tl.load(starts_ptr + part)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def copy_part(source_ptr, dest_ptr, start, stop, BLOCK: tl.constexpr):
    """dest[start:stop] = source[start:stop], this program's blocks of it."""
    first = start + tl.program_id(0).to(tl.int64) * BLOCK
    for offset in tl.range(first, stop, tl.num_programs(0) * BLOCK):
        offs = offset + tl.arange(0, BLOCK)
        tl.store(dest_ptr + offs, tl.load(source_ptr + offs, mask=offs < stop), mask=offs < stop)


@triton.jit
def sum_part(
    addresses_ptr, epoch, capacity, dest_ptr, dest_shift, start, stop,
    R: tl.constexpr, BLOCK: tl.constexpr,
):
    """dest[i - dest_shift] = sum over ranks of data[i], start <= i < stop, in rank order."""
    first = start + tl.program_id(0).to(tl.int64) * BLOCK
    for offset in tl.range(first, stop, tl.num_programs(0) * BLOCK):
        offs = offset + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for r in range(0, R):
            data = region_data(addresses_ptr, r, epoch, capacity, dest_ptr)
            total += tl.load(data + offs, mask=offs < stop, other=0.0).to(tl.float32)
        value = narrow(total, dest_ptr.dtype.element_ty)
        tl.store(dest_ptr + offs - dest_shift, value, mask=offs < stop)


@triton.jit
def all_reduce_one_shot_kernel(
    x_ptr, out_ptr, addresses_ptr, state_ptr, n, capacity, timeout_ns, rank,
    R: tl.constexpr, BLOCK: tl.constexpr,
):
    """Publish x, then sum everybody's x. Grid (programs)."""
    epoch = enter(state_ptr)
    copy_part(x_ptr, region_data(addresses_ptr, rank, epoch, capacity, x_ptr), 0, n, BLOCK)
    signal_peers(addresses_ptr, rank, epoch, tl.program_id(0), R)
    wait_peers(addresses_ptr, rank, epoch, tl.program_id(0), state_ptr, timeout_ns, R)
    sum_part(addresses_ptr, epoch, capacity, out_ptr, 0, 0, n, R, BLOCK)
    leave(state_ptr, epoch)


@triton.jit
def all_reduce_two_shot_kernel(
    x_ptr, out_ptr, starts_ptr, addresses_ptr, state_ptr, capacity, timeout_ns, rank,
    R: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Publish x; sum the own part over it in place; read the other parts from their owners.

    Only its owner reads or writes a part of its own region, so the sum needs no room."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    own = region_data(addresses_ptr, rank, epoch, capacity, x_ptr)
    for part in range(0, R):
        start = edge(starts_ptr, part, ALIGNED)
        copy_part(x_ptr, own, start, edge(starts_ptr, part + 1, ALIGNED), BLOCK)
    signal_peers(addresses_ptr, rank, epoch, program, R)
    wait_peers(addresses_ptr, rank, epoch, program, state_ptr, timeout_ns, R)
    start = edge(starts_ptr, rank, ALIGNED)
    stop = edge(starts_ptr, rank + 1, ALIGNED)
    sum_part(addresses_ptr, epoch, capacity, own, 0, start, stop, R, BLOCK)
    second = tl.num_programs(0) + program
    signal_peers(addresses_ptr, rank, epoch, second, R)
    wait_peers(addresses_ptr, rank, epoch, second, state_ptr, timeout_ns, R)
    for step in range(0, R):
        part = (rank + step) % R
        owner = region_data(addresses_ptr, part, epoch, capacity, x_ptr)
        start = edge(starts_ptr, part, ALIGNED)
        copy_part(owner, out_ptr, start, edge(starts_ptr, part + 1, ALIGNED), BLOCK)
    leave(state_ptr, epoch)


@triton.jit
def all_gather_kernel(
    x_ptr, out_ptr, starts_ptr, addresses_ptr, state_ptr, capacity, timeout_ns, rank,
    R: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Publish the own part at its place, then read every part, the own one first."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    start = edge(starts_ptr, rank, ALIGNED)
    stop = edge(starts_ptr, rank + 1, ALIGNED)
    own = region_data(addresses_ptr, rank, epoch, capacity, x_ptr)
    copy_part(x_ptr - start, own, start, stop, BLOCK)
    signal_peers(addresses_ptr, rank, epoch, program, R)
    wait_peers(addresses_ptr, rank, epoch, program, state_ptr, timeout_ns, R)
    for step in range(0, R):
        part = (rank + step) % R
        owner = region_data(addresses_ptr, part, epoch, capacity, x_ptr)
        start = edge(starts_ptr, part, ALIGNED)
        copy_part(owner, out_ptr, start, edge(starts_ptr, part + 1, ALIGNED), BLOCK)
    leave(state_ptr, epoch)


@triton.jit
def reduce_scatter_kernel(
    x_ptr, out_ptr, starts_ptr, addresses_ptr, state_ptr, capacity, timeout_ns, rank,
    R: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Publish x, then sum the own part of everybody's x."""
    epoch = enter(state_ptr)
    program = tl.program_id(0)
    own = region_data(addresses_ptr, rank, epoch, capacity, x_ptr)
    for part in range(0, R):
        start = edge(starts_ptr, part, ALIGNED)
        copy_part(x_ptr, own, start, edge(starts_ptr, part + 1, ALIGNED), BLOCK)
    signal_peers(addresses_ptr, rank, epoch, program, R)
    wait_peers(addresses_ptr, rank, epoch, program, state_ptr, timeout_ns, R)
    start = edge(starts_ptr, rank, ALIGNED)
    stop = edge(starts_ptr, rank + 1, ALIGNED)
    sum_part(addresses_ptr, epoch, capacity, out_ptr, start, start, stop, R, BLOCK)
    leave(state_ptr, epoch)


def even_counts(n: int, num_ranks: int, grain: int = 16) -> list[int]:
    """n cut as by pyparallel.cut.shard.part_sizes(unit=grain), which kernels do not know."""
    grains = cdiv(n, grain)
    base, more = divmod(grains, num_ranks)
    edges = [0, *accumulate((base + (r < more)) * grain for r in range(num_ranks))]
    return [min(b, n) - min(a, n) for a, b in pairwise(edges)]


def check_counts(counts: Sequence[int] | None, num_ranks: int, n: int) -> list[int]:
    """The parts' sizes: those given, or equal ones."""
    if counts is None:
        if n % num_ranks:
            raise ValueError(f"counts: expected the parts of {n} elements over {num_ranks} ranks, "
                             "got None and no equal division; pass counts")
        return [n // num_ranks] * num_ranks
    if len(counts) != num_ranks or min(counts) < 0 or sum(counts) != n:
        raise ValueError(f"counts: expected {num_ranks} sizes that sum to {n}, got {list(counts)}")
    return list(counts)


def _check(name: str, x: torch.Tensor, out: torch.Tensor, memory: SymmetricMemory) -> int:
    check_runnable(name, x, out, memory.addresses)
    check_dtype("x", x, FLOATS)
    if out.dtype != x.dtype or not x.is_contiguous() or not out.is_contiguous():
        raise ValueError(f"{name}: expected contiguous x and out of one dtype, got {x.dtype} and "
                         f"{out.dtype}; call .contiguous()")
    programs = min(MAX_PROGRAMS, num_processors(x))
    size = max(x.numel(), out.numel()) * x.element_size()
    memory.need(name, size, 2 * programs * memory.size)
    return programs


def _run(kernel, name, x, out, memory, counts) -> torch.Tensor:
    programs = _check(name, x, out, memory)
    starts = memory.starts(counts)
    config = elementwise_config(architecture(x), "collective")
    kernel[(programs,)](
        x, out, starts, memory.addresses, memory.state, memory.capacity, memory.timeout_ns,
        memory.rank, R=memory.size, BLOCK=config.block, num_warps=config.num_warps,
        ALIGNED=all(c % 16 == 0 for c in counts[:-1]),
    )
    memory.launched(name)
    return out


def all_reduce_out(
    x: torch.Tensor, out: torch.Tensor, memory: SymmetricMemory, *, algorithm: str | None = None
) -> torch.Tensor:
    """out = sum over ranks of x, which may be out. algorithm: "one_shot", "two_shot" or None."""
    check_shape("out", out, tuple(x.shape))
    if algorithm is None:
        small = x.numel() * x.element_size() <= ONE_SHOT_BYTES or memory.size == 2
        algorithm = "one_shot" if small else "two_shot"
    if algorithm == "two_shot":
        counts = even_counts(x.numel(), memory.size)
        return _run(all_reduce_two_shot_kernel, "all_reduce", x, out, memory, counts)
    if algorithm != "one_shot":
        raise ValueError(f"algorithm: expected one_shot or two_shot, got {algorithm!r}")
    programs = _check("all_reduce", x, out, memory)
    config = elementwise_config(architecture(x), "collective")
    all_reduce_one_shot_kernel[(programs,)](
        x, out, memory.addresses, memory.state, x.numel(), memory.capacity, memory.timeout_ns,
        memory.rank, R=memory.size, BLOCK=config.block, num_warps=config.num_warps,
    )
    memory.launched("all_reduce")
    return out


def all_reduce(
    x: torch.Tensor, memory: SymmetricMemory, *, algorithm: str | None = None
) -> torch.Tensor:
    """The sum over ranks as a new tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return all_reduce_out(x.contiguous(), out, memory, algorithm=algorithm)


def all_gather(
    x: torch.Tensor, memory: SymmetricMemory, *, counts: Sequence[int] | None = None
) -> torch.Tensor:
    """The flat parts of all ranks in rank order; counts: elements of each (None: all alike)."""
    sizes = [x.numel()] * memory.size if counts is None else list(counts)
    if len(sizes) != memory.size or sizes[memory.rank] != x.numel():
        raise ValueError(f"counts: expected {memory.size} sizes, {x.numel()} of them at rank "
                         f"{memory.rank}, got {sizes}")
    out = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
    return _run(all_gather_kernel, "all_gather", x.contiguous(), out, memory, sizes)


def reduce_scatter(
    x: torch.Tensor, memory: SymmetricMemory, *, counts: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's part of the sum over ranks of flat x; counts: elements of each part."""
    sizes = check_counts(counts, memory.size, x.numel())
    out = torch.empty(sizes[memory.rank], dtype=x.dtype, device=x.device)
    return _run(reduce_scatter_kernel, "reduce_scatter", x.contiguous(), out, memory, sizes)
