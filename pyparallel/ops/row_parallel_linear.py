"""A matmul whose input features are cut over the ranks.

Legend: K input features, K_r this rank's, M output features. ``y`` and ``dy`` are replicated.

    forward   y[..., M] = all_reduce(x_shard_k[..., K_r] w_shard_k[M, K_r]^T) + b
    dgrad     dx_shard_k = dy w_shard_k
    wgrad     dw_shard_k = dy^T x_shard_k
    dbias     db = sum dy        (equal on all ranks; the bias is added once, after the reduction)

Communication: one all-reduce forward, none backward.
Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (the operator g).

Eager code asks the table directly; a compiled graph calls the registered operator, which asks it when it
runs. A group is named by ``Group.handle``.

    linear_all_reduce(Tensor x, Tensor weight, Tensor? bias, int group) -> Tensor
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import autocast, backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.ops.linear import bias_grad


def linear_then_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """The op by its parts: matmul, on whichever backend multiplies, all-reduce, bias. No autograd."""
    y = all_reduce_raw(backend.call("linear", x, weight), group)
    return y if bias is None else y.add_(bias)


def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``y = all_reduce(x_shard_k w_shard_k^T) + b``, as one where a row of the table does it. No
    autograd."""
    return backend.compose("linear_all_reduce", linear_then_all_reduce, x, weight, bias, group)


class _RowParallelLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        if torch.compiler.is_compiling():
            return torch.ops.pyparallel.linear_all_reduce(x, weight, bias, group.handle)
        return linear_all_reduce(x, weight, bias, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            backend.call("linear_dgrad", grad, weight) if need_x else None,
            backend.call("linear_wgrad", grad, x) if need_weight else None,
            bias_grad(grad) if need_bias else None,
            None,
        )


def row_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: Group
) -> Tensor:
    """``y = all_reduce(x_shard_k w_shard_k^T) + b``; see the module's equations.

    Args:
        x: [..., K_r], this rank's input features. weight: [M, K_r]. bias: [M], the whole one.
    """
    if autocast.is_on():
        x, weight, bias = autocast.lowered(x, weight, bias)
    if group.size == 1:
        return backend.call("linear", x, weight, bias)
    return _RowParallelLinear.apply(x, weight, bias, group)


def _real(x: Tensor, weight: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return linear_all_reduce(x, weight, bias, Group.of_handle(group))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("pyparallel", "FRAGMENT")
_library.define("linear_all_reduce(Tensor x, Tensor weight, Tensor? bias, int group) -> Tensor")
_library.impl("linear_all_reduce", _real, "CompositeExplicitAutograd")
torch.library.register_fake("pyparallel::linear_all_reduce", _fake, lib=_library)
