"""linear_reduce_scatter of CPU ranks that share memory.

Chunks (rank + s) % R, s = 1 .. R - 1, each written where its owner reads it; show them; multiply the own
chunk; wait; one sum in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.comm.shared.buffer import sum_parts
from pyparallel.comm.shared.host_tensors import REDUCIBLE_CODES
from pyparallel.ops.cpu._chunks import others, starts
from pyparallel.ops.cpu._chunks import reason_against as reason  # noqa: F401
from pyparallel.ops.linear import linear_into


def run(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_s[..., S_r, M]`` of ``x_shard_k [..., S, K_r]``; no autograd."""
    lead, width, dtype = x_shard_k.shape[:-2], weight.shape[0], x_shard_k.dtype
    count, first = lead.numel(), starts(sizes)
    total = count * sum(sizes) * width * x_shard_k.itemsize
    record_collective("reduce_scatter", total)
    buffer = group.communicator.shared_buffer(total)

    def part(owner: int, rank: int) -> Tensor:
        """What ``owner`` multiplied of rank's chunk, in the owner's memory."""
        offset = count * first[rank] * width
        return buffer.of(owner, offset, (*lead, sizes[rank], width), dtype)

    def multiply(rank: int, out: Tensor) -> None:
        chunk = x_shard_k.narrow(-2, first[rank], sizes[rank]).contiguous()
        linear_into(chunk, weight, None, out)

    for rank in others(group):
        multiply(rank, part(group.rank, rank))
    buffer.announce(total, REDUCIBLE_CODES[dtype])
    y = torch.empty(*lead, sizes[group.rank], width, dtype=dtype)
    multiply(group.rank, y)
    buffer.await_all()
    parts = [y if r == group.rank else part(r, group.rank) for r in range(group.size)]
    sum_parts(parts, y, REDUCIBLE_CODES[dtype])
    buffer.next_turn()
    return y if bias is None else y.add_(bias)
