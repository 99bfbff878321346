"""A matmul whose input is gathered along the sequence and whose output features are cut.

Legend: S tokens, S_r this rank's, K input features, M output features, M_r this rank's.

    forward   y_shard_m[..., S, M_r] = all_gather(x_shard_s[..., S_r, K]) w_shard_m[M_r, K]^T + b_shard_m
    dgrad     dx_shard_s[..., S_r, K] = reduce_scatter(dy_shard_m w_shard_m)
    wgrad     dw_shard_m = dy_shard_m^T all_gather(x_shard_s)
    dbias     db_shard_m = sum dy_shard_m

Only the shard of x is kept for backward; it is gathered again under the dgrad matmul, and the
reduce-scatter runs under the wgrad matmul. The forward matmul runs chunk by chunk, a chunk being one
rank's tokens, on every backend: a library may multiply 8 rows in another order than 24, so equal chunks
are what makes an overlapped path give the bits of the plain one.

Communication: one all-gather forward; one all-gather (where w needs a gradient) and one reduce-scatter
backward. Source: Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
models", section 4.2.2 (the operator g).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import autocast, backend
from pyparallel.comm.collectives import all_gather_raw, reduce_scatter_raw
from pyparallel.comm.group import Group
from pyparallel.ops.linear import bias_grad, linear_into
from pyparallel.ops.sequence_ops import sequence_operator


def gather_then_linear(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """The op by its parts: all-gather, then a matmul a chunk, on whichever backend multiplies. No
    autograd.

    Args:
        x_shard_s: [..., S_r, K]. sizes: every rank's S_r.
    """
    lead = x_shard_s.shape[:-2]
    count = lead.numel()
    rows = [count * size for size in sizes]
    # Rank by rank, not joined along the sequence: each chunk is then one piece of memory.
    gathered = all_gather_raw(x_shard_s.reshape(-1, x_shard_s.shape[-1]), group, sizes=rows)
    y = x_shard_s.new_empty(*lead, sum(sizes), weight.shape[0])
    for chunk, out in zip(gathered.split(rows), y.split(list(sizes), -2), strict=True):
        linear_into(chunk.view(*out.shape[:-1], chunk.shape[-1]), weight, bias, out)
    return y


def _forward(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    given = x_shard_s, weight, bias, group, sizes
    return backend.compose("all_gather_linear", gather_then_linear, *given)


_call = sequence_operator("all_gather_linear", _forward, tokens=lambda sizes, _: sum(sizes))


def plain_backward(
    grad: Tensor,
    x_shard_s: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx_shard_s and dw_shard_m by the op's parts, each where ``needs`` asks for it."""
    options = {"dim": -2, "sizes": sizes, "async_op": True}
    gathered = scattered = grad_weight = None
    if needs[1]:
        gathered = all_gather_raw(x_shard_s, group, **options)
    if needs[0]:
        partial = backend.call("linear_dgrad", grad, weight)
        scattered = reduce_scatter_raw(partial, group, **options)
    if gathered is not None:
        grad_weight = backend.call("linear_wgrad", grad, gathered.wait())
    return None if scattered is None else scattered.wait(), grad_weight


class _AllGatherLinear(Function):
    @staticmethod
    def forward(
        ctx, x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes
    ) -> Tensor:
        ctx.save_for_backward(x_shard_s, weight)
        ctx.cut = group, sizes
        return _call(x_shard_s, weight, bias, group, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_shard_s, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        given = grad, x_shard_s, weight, *ctx.cut, (need_x, need_weight)
        op = "all_gather_linear_backward"
        grad_x, grad_weight = backend.compose(op, plain_backward, *given)
        grad_bias = bias_grad(grad) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def all_gather_linear(
    x_shard_s: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    sizes: Sequence[int],
) -> Tensor:
    """``y_shard_m = all_gather(x_shard_s) w_shard_m^T + b_shard_m``; see the module's equations.

    Args:
        x_shard_s: [..., S_r, K]. weight: [M_r, K]. bias: [M_r].
        sizes: every rank's S_r.
    """
    if autocast.is_on():
        x_shard_s, weight, bias = autocast.lowered(x_shard_s, weight, bias)
    if group.size == 1:
        return backend.call("linear", x_shard_s, weight, bias)
    return _AllGatherLinear.apply(x_shard_s, weight, bias, group, sizes)
