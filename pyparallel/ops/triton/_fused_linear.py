"""The parallel linear layers on Triton: one kernel for the matmul and its collective.

Legend and equations are those of the modules of the ops' names; R rows of a shard, M rows of all.

    op                               kernel
    all_gather_linear                all_gather_matmul
      backward                       matmul_reduce_scatter (dx), all_gather and matmul (dw)
    linear_reduce_scatter            matmul_reduce_scatter
      backward                       all_gather_matmul (dx, and dy gathered), matmul (dw)
    linear_all_reduce                matmul_all_reduce
    column_parallel_linear_backward  matmul_all_reduce (dx), matmul (dw)

A fused kernel has the bits of its collective and one matmul of all rows; the ops' parts multiply chunk
by chunk. Partial sums travel in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.kernels.collective.all_gather_matmul import all_gather_matmul
from pyparallel.kernels.collective.matmul_all_reduce import matmul_all_reduce
from pyparallel.kernels.collective.matmul_reduce_scatter import matmul_reduce_scatter
from pyparallel.ops.triton._peers import peers, peers_reason


def fused_reason(x: Tensor, *rest: Any) -> str | None:
    """Why a matmul can't run as one with its collective, or None.

    Args:
        rest: the other arguments of any of these ops, one of which is the group.
    """
    return peers_reason(x, next(given for given in rest if isinstance(given, Group)))


def gather_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(all_gather(x) weight^T + bias, all_gather(x)) of rows [M_r, K]."""
    record_collective("all_gather", sum(counts) * x.shape[1] * x.itemsize)
    with peers(x, group, max(counts) * x.shape[1] * x.itemsize) as memory:
        return all_gather_matmul(x, weight, memory, counts=counts, bias=bias)


def matmul_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, counts: Sequence[int]
) -> Tensor:
    """reduce_scatter(x weight^T) + bias of rows [M, K_r]."""
    width = weight.shape[0]
    record_collective("reduce_scatter", sum(counts) * width * x.itemsize)
    with peers(x, group, group.size * max(counts) * width * x.itemsize) as memory:
        return matmul_reduce_scatter(x, weight, memory, counts=counts, bias=bias)


def matmul_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """all_reduce(x weight^T) + bias of rows [M, K_r]."""
    num_bytes = x.shape[0] * weight.shape[0] * x.itemsize
    record_collective("all_reduce", num_bytes)
    # Two-shot, which size chooses, keeps a partial of every rank.
    with peers(x, group, group.size * num_bytes) as memory:
        return matmul_all_reduce(x, weight, memory, bias=bias)
