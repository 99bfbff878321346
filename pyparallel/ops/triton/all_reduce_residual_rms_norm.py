"""A reduction, the residual and the norm behind it, as one operation.

Legend: x[..., H] this rank's partial sum; residual, h, y [..., H] replicated.

    forward   h = residual + all_reduce(x);   y = rms_norm(h) weight
    backward  dh' = dh + rms_norm's dx(dy);   dx = dresidual = dh'   (equal on all ranks)

A fused way of what a row-parallel layer, an addition and a norm do, with their bits.
Communication: one all-reduce forward, none backward.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.kernels.collective.all_reduce_residual_rms_norm import (
    all_reduce_residual_rms_norm,
)
from pyparallel.kernels.norm.norm import rms_norm
from pyparallel.kernels.norm.norm_backward import norm_backward
from pyparallel.ops.linear import rows
from pyparallel.ops.triton._peers import peers, peers_reason


def reason(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: Group
) -> str | None:
    """Why a call can't, or should not, run here."""
    if weight is None or weight.dtype != x.dtype or residual.dtype != x.dtype:
        return "expected x, residual and weight in one dtype"
    return peers_reason(x, group)


class _Fused(Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
    ) -> tuple[Tensor, Tensor]:
        record_collective("all_reduce", x.numel() * x.itemsize)
        # h and y of the rows that a rank owns, in the two-shot way.
        with peers(x, group, 2 * x.numel() * x.itemsize) as memory:
            y, h = all_reduce_residual_rms_norm(rows(x), rows(residual), weight, memory, eps=eps)
        ctx.save_for_backward(h, weight)
        ctx.eps = eps
        return y.view(x.shape), h.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        rstd = rms_norm(h, weight, eps=ctx.eps).rstd
        after = rows(dh).contiguous()
        grads = norm_backward(rows(dy).contiguous(), h, weight, None, rstd, dh_after=after)
        dx = grads.dx.view(dy.shape)
        return dx, dx, grads.dweight, None, None


def run(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> tuple[Tensor, Tensor]:
    """(y, h); see the module's equations. Differentiable.

    Args:
        x: [..., H], this rank's partial sum. residual: [..., H], replicated. weight: [H].
    """
    return _Fused.apply(x, residual, weight, eps, group)
