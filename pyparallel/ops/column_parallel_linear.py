"""A matmul whose output features are cut over the ranks.

Legend: K input features, M output features, M_r this rank's. ``x`` is replicated.

    forward   y_shard_m[..., M_r] = x[..., K] w_shard_m[M_r, K]^T + b_shard_m
    dgrad     dx[..., K] = all_reduce(dy_shard_m w_shard_m)
    wgrad     dw_shard_m = dy_shard_m^T x
    dbias     db_shard_m = sum dy_shard_m

Communication: none forward, one all-reduce backward, which runs under the weight gradient.
Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (the operator f).
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import autocast, backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.ops.linear import bias_grad


def plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: Group, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw_shard_m by the op's parts, each where ``needs`` asks for it: the all-reduce runs under
    wgrad."""
    grad_x = pending = grad_weight = None
    if needs[0]:
        grad_x = backend.call("linear_dgrad", grad, weight)
        if group.size > 1:
            pending = all_reduce_raw(grad_x, group, async_op=True)
    if needs[1]:
        grad_weight = backend.call("linear_wgrad", grad, x)
    return grad_x if pending is None else pending.wait(), grad_weight


def column_parallel_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: Group, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx, the whole sum, and dw_shard_m, each where ``needs`` asks for it."""
    op = "column_parallel_linear_backward"
    return backend.compose(op, plain_backward, grad, x, weight, group, needs)


class _ColumnParallelLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return backend.call("linear", x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        needs = need_x, need_weight
        grad_x, grad_weight = column_parallel_linear_backward(grad, x, weight, ctx.group, needs)
        return grad_x, grad_weight, bias_grad(grad) if need_bias else None, None


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: Group
) -> Tensor:
    """``y_shard_m = x w_shard_m^T + b_shard_m``; see the module's equations.

    Args:
        x: [..., K], replicated. weight: [M_r, K]. bias: [M_r].
    """
    if autocast.is_on():
        x, weight, bias = autocast.lowered(x, weight, bias)
    if group.size == 1:
        return backend.call("linear", x, weight, bias)
    return _ColumnParallelLinear.apply(x, weight, bias, group)
