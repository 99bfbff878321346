"""A matmul whose input features are cut and whose output is summed and cut along the sequence.

Legend: S tokens, S_r this rank's, K input features, K_r this rank's, M output features.

    forward   y_shard_s[..., S_r, M] = reduce_scatter(x_shard_k[..., S, K_r] w_shard_k[M, K_r]^T) + b
    dgrad     dx_shard_k = all_gather(dy_shard_s) w_shard_k
    wgrad     dw_shard_k = all_gather(dy_shard_s)^T x_shard_k
    dbias     db = sum all_gather(dy_shard_s)     (equal on all ranks)

The bias is added once, to the sum. dy is gathered for dgrad and wgrad anyway, so the bias's gradient,
a sum over the ranks' tokens, costs no communication of its own. This rank's chunk of dgrad runs while
the others travel. The forward matmul runs chunk by chunk on every backend, as in
:mod:`pyparallel.ops.all_gather_linear`, and for the same reason.

Communication: one reduce-scatter forward, one all-gather backward.
Source: Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models",
section 4.2.2 (the operator g-bar).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import autocast, backend
from pyparallel.comm.collectives import all_gather_raw, reduce_scatter_raw
from pyparallel.comm.group import Group
from pyparallel.ops.linear import bias_grad, linear_into
from pyparallel.ops.sequence_ops import sequence_operator


def linear_then_reduce_scatter(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """The op by its parts: a matmul a chunk, on whichever backend multiplies, then reduce-scatter. No
    autograd.

    Args:
        x_shard_k: [..., S, K_r]. sizes: every rank's S_r.
    """
    lead = x_shard_k.shape[:-2]
    count = lead.numel()
    width = weight.shape[0]
    rows = [count * size for size in sizes]
    # Rank by rank, not joined along the sequence: each chunk is then one piece of memory.
    partial = x_shard_k.new_empty(sum(rows), width)
    for chunk, out in zip(x_shard_k.split(list(sizes), -2), partial.split(rows), strict=True):
        linear_into(chunk.contiguous(), weight, None, out.view(*chunk.shape[:-1], width))
    y = reduce_scatter_raw(partial, group, sizes=rows)
    y = y.view(*lead, sizes[group.rank], width)
    return y if bias is None else y.add_(bias)


def _forward(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    given = x_shard_k, weight, bias, group, sizes
    return backend.compose("linear_reduce_scatter", linear_then_reduce_scatter, *given)


_call = sequence_operator(
    "linear_reduce_scatter", _forward, tokens=lambda sizes, group: sizes[group.rank]
)


def plain_backward(
    grad: Tensor,
    x_shard_k: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx_shard_k, dw_shard_k and db by the op's parts, each where ``needs`` asks for it."""
    need_x, need_weight, need_bias = needs
    pending = all_gather_raw(grad, group, dim=-2, sizes=sizes, async_op=True)
    own = backend.call("linear_dgrad", grad, weight) if need_x else None
    whole = pending.wait()
    grad_x = None
    if need_x:
        pieces = [
            own if rank == group.rank else backend.call("linear_dgrad", piece, weight)
            for rank, piece in enumerate(whole.split(list(sizes), -2))
        ]
        grad_x = torch.cat(pieces, -2)
    grad_weight = backend.call("linear_wgrad", whole, x_shard_k) if need_weight else None
    return grad_x, grad_weight, bias_grad(whole) if need_bias else None


class _LinearReduceScatter(Function):
    @staticmethod
    def forward(
        ctx, x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes
    ) -> Tensor:
        ctx.save_for_backward(x_shard_k, weight)
        ctx.cut = group, sizes
        return _call(x_shard_k, weight, bias, group, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_shard_k, weight = ctx.saved_tensors
        given = grad, x_shard_k, weight, *ctx.cut, ctx.needs_input_grad[:3]
        op = "linear_reduce_scatter_backward"
        return (*backend.compose(op, plain_backward, *given), None, None)


def linear_reduce_scatter(
    x_shard_k: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    sizes: Sequence[int],
) -> Tensor:
    """``y_shard_s = reduce_scatter(x_shard_k w_shard_k^T) + b``; see the module's equations.

    Args:
        x_shard_k: [..., S, K_r]. weight: [M, K_r]. bias: [M], the whole one.
        sizes: every rank's S_r.
    """
    if autocast.is_on():
        x_shard_k, weight, bias = autocast.lowered(x_shard_k, weight, bias)
    if group.size == 1:
        return backend.call("linear", x_shard_k, weight, bias)
    return _LinearReduceScatter.apply(x_shard_k, weight, bias, group, sizes)
