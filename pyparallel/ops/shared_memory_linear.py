"""all_gather_linear and linear_reduce_scatter of CPU ranks that share memory: no gathered copy.

Both multiply chunk by chunk, a chunk being one rank's tokens, as the plain path does: same bits.

    all_gather_linear       show x, multiply the own chunk; wait; then chunks (rank + s) % R, each read
                            in place from its owner's memory
    linear_reduce_scatter   chunks (rank + s) % R, s = 1 .. R - 1, each written where its owner reads it;
                            show them; multiply the own chunk; wait; one sum in rank order

A rank waits only after it has multiplied what needs nobody, so ranks that are up to one chunk's time
apart don't wait at all. Copies: its own shard, once, into the shared memory; the plain path writes every
shard there, and reads it out again into the gathered tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.comm.shared.buffer import SharedBuffer, sum_parts
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.shared.host_tensors import REDUCIBLE_CODES
from pyparallel.ops.linear import linear_into


def reason_against(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> str | None:
    """Why a call can't run here."""
    if not isinstance(group.communicator, SharedMemoryCommunicator):
        return f"the group '{group.communicator.name}' does not share memory"
    if not (x.is_cpu and weight.is_cpu):
        return f"the tensors are on {x.device} and {weight.device}"
    if x.dtype not in REDUCIBLE_CODES:
        return f"{x.dtype} cannot be summed"
    return None


def _others(group: Group) -> list[int]:
    return [(group.rank + step) % group.size for step in range(1, group.size)]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:rank]) for rank in range(len(sizes))]


def _turn(group: Group, num_bytes: int) -> SharedBuffer:
    return group.communicator.shared_buffer(num_bytes)


@backend.register("all_gather_linear", "cpu", supports=reason_against)
def all_gather_linear(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_m[..., S, M_r]`` of ``x_shard_s [..., S_r, K]``; no autograd."""
    lead, width = x_shard_s.shape[:-2], x_shard_s.shape[-1]
    count, starts = lead.numel(), _starts(sizes)
    total = count * sum(sizes) * width * x_shard_s.itemsize
    record_collective("all_gather", total)
    buffer = _turn(group, count * max(sizes) * width * x_shard_s.itemsize)
    y = x_shard_s.new_empty(*lead, sum(sizes), weight.shape[0])

    def multiply(rank: int, chunk: Tensor) -> None:
        linear_into(chunk, weight, bias, y.narrow(-2, starts[rank], sizes[rank]))

    own = x_shard_s.contiguous()
    buffer.of(group.rank, 0, own.shape, own.dtype).copy_(own)
    buffer.announce(total, REDUCIBLE_CODES[own.dtype])
    multiply(group.rank, own)
    buffer.await_all()
    for rank in _others(group):
        multiply(rank, buffer.of(rank, 0, (*lead, sizes[rank], width), own.dtype))
    buffer.next_turn()
    return y


@backend.register("linear_reduce_scatter", "cpu", supports=reason_against)
def linear_reduce_scatter(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_s[..., S_r, M]`` of ``x_shard_k [..., S, K_r]``; no autograd."""
    lead, width, dtype = x_shard_k.shape[:-2], weight.shape[0], x_shard_k.dtype
    count, starts = lead.numel(), _starts(sizes)
    total = count * sum(sizes) * width * x_shard_k.itemsize
    record_collective("reduce_scatter", total)
    buffer = _turn(group, total)

    def part(owner: int, rank: int) -> Tensor:
        """What ``owner`` multiplied of rank's chunk, in the owner's memory."""
        offset = count * starts[rank] * width
        return buffer.of(owner, offset, (*lead, sizes[rank], width), dtype)

    def multiply(rank: int, out: Tensor) -> None:
        chunk = x_shard_k.narrow(-2, starts[rank], sizes[rank]).contiguous()
        linear_into(chunk, weight, None, out)

    for rank in _others(group):
        multiply(rank, part(group.rank, rank))
    buffer.announce(total, REDUCIBLE_CODES[dtype])
    y = torch.empty(*lead, sizes[group.rank], width, dtype=dtype)
    multiply(group.rank, y)
    buffer.await_all()
    parts = [y if r == group.rank else part(r, group.rank) for r in range(group.size)]
    sum_parts(parts, y, REDUCIBLE_CODES[dtype])
    buffer.next_turn()
    return y if bias is None else y.add_(bias)
