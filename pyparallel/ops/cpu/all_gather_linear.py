"""all_gather_linear of CPU ranks that share memory: no gathered copy.

Show x and multiply the own chunk; wait; then chunks (rank + s) % R, each read in place from its owner's
memory. Copies: its own shard, once, into the shared memory; the op's parts write every shard there, and
read it out again into the gathered tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.comm.shared.host_tensors import REDUCIBLE_CODES
from pyparallel.ops.cpu._chunks import others, starts
from pyparallel.ops.cpu._chunks import reason_against as reason  # noqa: F401
from pyparallel.ops.linear import linear_into


def run(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_m[..., S, M_r]`` of ``x_shard_s [..., S_r, K]``; no autograd."""
    lead, width = x_shard_s.shape[:-2], x_shard_s.shape[-1]
    count, first = lead.numel(), starts(sizes)
    total = count * sum(sizes) * width * x_shard_s.itemsize
    record_collective("all_gather", total)
    buffer = group.communicator.shared_buffer(count * max(sizes) * width * x_shard_s.itemsize)
    y = x_shard_s.new_empty(*lead, sum(sizes), weight.shape[0])

    def multiply(rank: int, chunk: Tensor) -> None:
        linear_into(chunk, weight, bias, y.narrow(-2, first[rank], sizes[rank]))

    own = x_shard_s.contiguous()
    buffer.of(group.rank, 0, own.shape, own.dtype).copy_(own)
    buffer.announce(total, REDUCIBLE_CODES[own.dtype])
    multiply(group.rank, own)
    buffer.await_all()
    for rank in others(group):
        multiply(rank, buffer.of(rank, 0, (*lead, sizes[rank], width), own.dtype))
    buffer.next_turn()
    return y
