"""One round of every collective on a communicator, against the sequential, rank-ordered truth."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from pyparallel.comm.communicator import Communicator


def made(dtype: torch.dtype, length: int, rank: int, seed: int) -> Tensor:
    """What ``rank`` puts in; every rank can rebuild it, so the reference needs no communication."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point or dtype.is_complex:
        return (torch.randn(length, generator=generator, dtype=torch.float64) * 50).to(dtype)
    values = torch.randint(0, 100, (length,), generator=generator)
    return (values % 2).bool() if dtype == torch.bool else values.to(dtype)


def reduced(parts: list[Tensor], op: str) -> Tensor:
    """The truth: in rank order, in fp32 where the type is narrower, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        if op == "sum":
            total = total + part.to(wide)
        else:
            total = (torch.maximum if op == "max" else torch.minimum)(total, part.to(wide))
    return total.to(dtype)


def cut(length: int, size: int, seed: int) -> list[int]:
    """Uneven counts, zeros among them."""
    cuts = sorted(random.Random(seed).randint(0, length) for _ in range(size - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


def same_bits(result: Tensor, expected: Tensor) -> bool:
    return result.dtype == expected.dtype and torch.equal(
        result.view(torch.uint8), expected.view(torch.uint8)
    )


def check_reductions(comm: Communicator, dtype: torch.dtype, length: int) -> None:
    parts = [made(dtype, length, r, seed=length) for r in range(comm.size)]
    for op in ("sum", "max", "min"):
        expected = reduced(parts, op)
        data = parts[comm.rank].clone()
        comm.all_reduce(data, op=op)
        assert same_bits(data, expected), ("all_reduce", dtype, length, op)
        counts = cut(length, comm.size, seed=length)
        own = torch.full((counts[comm.rank],), 77).to(dtype)
        comm.reduce_scatter(own, parts[comm.rank], counts=counts, op=op)
        assert same_bits(own, expected.split(counts)[comm.rank]), ("reduce_scatter", dtype, op)


def check_movement(comm: Communicator, dtype: torch.dtype, length: int) -> None:
    size, rank = comm.size, comm.rank
    counts = cut(length, size, seed=length)
    parts = [made(dtype, count, r, seed=length) for r, count in enumerate(counts)]
    output = torch.ones(length).to(dtype)
    comm.all_gather(output, parts[rank], counts=counts)
    assert same_bits(output, torch.cat(parts)), ("all_gather", dtype, length)

    sent = [cut(length, size, seed=7 * length + r) for r in range(size)]
    inputs = [made(dtype, length, r, seed=length + 1) for r in range(size)]
    received = [sent[r][rank] for r in range(size)]
    output = torch.ones(sum(received)).to(dtype)
    comm.all_to_all(output, inputs[rank], output_counts=received, input_counts=sent[rank])
    expected = torch.cat([inputs[r].split(sent[r])[rank] for r in range(size)])
    assert same_bits(output, expected), ("all_to_all", dtype, length)

    for src in range(size):
        data = made(dtype, length, rank, seed=length + 2)
        comm.broadcast(data, src)
        assert same_bits(data, made(dtype, length, src, seed=length + 2)), ("broadcast", src)

    if size > 1:
        message = made(dtype, length, rank, seed=length + 3)
        inbox = torch.ones(length).to(dtype)
        sends_first = rank % 2 == 0
        if sends_first:
            comm.send(message, (rank + 1) % size, tag=length)
        comm.recv(inbox, (rank - 1) % size, tag=length)
        if not sends_first:
            comm.send(message, (rank + 1) % size, tag=length)
        assert same_bits(inbox, made(dtype, length, (rank - 1) % size, seed=length + 3))
