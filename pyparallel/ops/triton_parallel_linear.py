"""The parallel linear layers on Triton: one kernel for the matmul and its collective.

Fused where ``triton`` is asked for by name and the ranks reach each other's memory; elsewhere the plain
path, on whichever matmul the table finds. Legend and equations are those of the modules of the ops'
names; R rows of a shard, M rows of all.

    op                               kernel
    all_gather_linear                all_gather_matmul
      backward                       matmul_reduce_scatter (dx), all_gather and matmul (dw)
    linear_reduce_scatter            matmul_reduce_scatter
      backward                       all_gather_matmul (dx, and dy gathered), matmul (dw)
    linear_all_reduce                matmul_all_reduce
    column_parallel_linear_backward  matmul_all_reduce (dx), matmul (dw)

A fused kernel has the bits of its collective and one matmul of all rows; the plain path multiplies chunk
by chunk. Partial sums travel in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.collectives import all_gather_raw, record_collective
from pyparallel.comm.group import Group
from pyparallel.ops import all_gather_linear as plain_gather
from pyparallel.ops import column_parallel_linear as plain_column
from pyparallel.ops import linear_reduce_scatter as plain_scatter
from pyparallel.ops import row_parallel_linear as plain_row
from pyparallel.ops.linear import bias_grad, rows
from pyparallel.ops.triton_collectives import peers, peers_reason
from pyparallel.ops.triton_ops import linear_wgrad, reason_against


def _fused(x: Tensor, group: Group) -> bool:
    return peers_reason(x, group) is None


def rank_by_rank(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[..., S, K] to rows [M, K] in which each rank's tokens lie together."""
    if x.shape[:-2].numel() == 1:
        return x.reshape(-1, x.shape[-1])
    return torch.cat([part.reshape(-1, x.shape[-1]) for part in x.split(list(sizes), -2)])


def join_tokens(y: Tensor, lead: torch.Size, sizes: Sequence[int]) -> Tensor:
    """Rows [M, N], rank by rank, to [..., S, N]."""
    if lead.numel() == 1:
        return y.view(*lead, sum(sizes), y.shape[-1])
    parts = y.split([lead.numel() * size for size in sizes])
    shaped = [p.view(*lead, size, y.shape[-1]) for p, size in zip(parts, sizes, strict=True)]
    return torch.cat(shaped, -2)


def _gather_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(all_gather(x) weight^T + bias, all_gather(x)) of rows [M_r, K]."""
    from pyparallel.kernels.collective.all_gather_matmul import all_gather_matmul

    record_collective("all_gather", sum(counts) * x.shape[1] * x.itemsize)
    with peers(x, group, max(counts) * x.shape[1] * x.itemsize) as memory:
        return all_gather_matmul(x, weight, memory, counts=counts, bias=bias)


def _matmul_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, counts: Sequence[int]
) -> Tensor:
    """reduce_scatter(x weight^T) + bias of rows [M, K_r]."""
    from pyparallel.kernels.collective.matmul_reduce_scatter import matmul_reduce_scatter

    width = weight.shape[0]
    record_collective("reduce_scatter", sum(counts) * width * x.itemsize)
    with peers(x, group, group.size * max(counts) * width * x.itemsize) as memory:
        return matmul_reduce_scatter(x, weight, memory, counts=counts, bias=bias)


def _matmul_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """all_reduce(x weight^T) + bias of rows [M, K_r]."""
    from pyparallel.kernels.collective.matmul_all_reduce import matmul_all_reduce

    num_bytes = x.shape[0] * weight.shape[0] * x.itemsize
    record_collective("all_reduce", num_bytes)
    # Two-shot, which size chooses, keeps a partial of every rank.
    with peers(x, group, group.size * num_bytes) as memory:
        return matmul_all_reduce(x, weight, memory, bias=bias)


@backend.register("all_gather_linear", "triton", supports=reason_against)
def all_gather_linear(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_m[..., S, M_r]`` of ``x_shard_s [..., S_r, K]``. No autograd."""
    if not _fused(x_shard_s, group):
        return plain_gather.gather_then_linear(x_shard_s, weight, bias, group, sizes)
    lead = x_shard_s.shape[:-2]
    counts = [lead.numel() * size for size in sizes]
    x = x_shard_s.reshape(-1, x_shard_s.shape[-1])
    return join_tokens(_gather_matmul(x, weight, bias, group, counts)[0], lead, sizes)


@backend.register("all_gather_linear_backward", "triton")
def all_gather_linear_backward(
    grad: Tensor,
    x_shard_s: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx_shard_s and dw_shard_m, each where ``needs`` asks for it."""
    if not _fused(grad, group):
        return plain_gather.plain_backward(grad, x_shard_s, weight, group, sizes, needs)
    counts = [x_shard_s.shape[:-2].numel() * size for size in sizes]
    grad_x = grad_weight = None
    dy = rank_by_rank(grad, sizes)
    if needs[1]:
        x = x_shard_s.reshape(-1, x_shard_s.shape[-1])
        grad_weight = linear_wgrad(dy, all_gather_raw(x, group, sizes=counts))
    if needs[0]:
        grad_x = _matmul_scatter(dy, weight.t(), None, group, counts).view(x_shard_s.shape)
    return grad_x, grad_weight


@backend.register("linear_reduce_scatter", "triton", supports=reason_against)
def linear_reduce_scatter(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_s[..., S_r, M]`` of ``x_shard_k [..., S, K_r]``. No autograd."""
    if not _fused(x_shard_k, group):
        return plain_scatter.linear_then_reduce_scatter(x_shard_k, weight, bias, group, sizes)
    lead = x_shard_k.shape[:-2]
    counts = [lead.numel() * size for size in sizes]
    y = _matmul_scatter(rank_by_rank(x_shard_k, sizes), weight, bias, group, counts)
    return y.view(*lead, sizes[group.rank], weight.shape[0])


@backend.register("linear_reduce_scatter_backward", "triton")
def linear_reduce_scatter_backward(
    grad: Tensor,
    x_shard_k: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx_shard_k, dw_shard_k and db, each where ``needs`` asks for it."""
    if not _fused(grad, group):
        return plain_scatter.plain_backward(grad, x_shard_k, weight, group, sizes, needs)
    lead = grad.shape[:-2]
    counts = [lead.numel() * size for size in sizes]
    own = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = None
    if needs[0]:
        dx, dy = _gather_matmul(own, weight.t(), None, group, counts)
        grad_x = join_tokens(dx, lead, sizes)
    else:
        dy = all_gather_raw(own, group, sizes=counts)
    if needs[1]:
        grad_weight = linear_wgrad(dy, rank_by_rank(x_shard_k, sizes))
    return grad_x, grad_weight, bias_grad(dy) if needs[2] else None


@backend.register("linear_all_reduce", "triton", supports=reason_against)
def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``y[..., M]``, the whole sum, of ``x[..., K_r]``. No autograd."""
    if not _fused(x, group):
        return plain_row.linear_all_reduce(x, weight, bias, group)
    y = _matmul_reduce(rows(x), weight, bias, group)
    return y.view(*x.shape[:-1], weight.shape[0])


@backend.register("column_parallel_linear_backward", "triton")
def column_parallel_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: Group, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx, the whole sum, and dw_shard_m, each where ``needs`` asks for it."""
    if not _fused(grad, group):
        return plain_column.plain_backward(grad, x, weight, group, needs)
    grad_x = None
    if needs[0]:
        grad_x = _matmul_reduce(rows(grad), weight.t(), None, group).view(x.shape)
    return grad_x, linear_wgrad(grad, x) if needs[1] else None
