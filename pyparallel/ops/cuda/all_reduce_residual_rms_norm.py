"""all_reduce_residual_rms_norm of GPUs of one machine: sum, residual and norm in one peer kernel
(csrc/cuda: all_reduce_norm)."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.native.cuda import ops
from pyparallel.ops.cuda._peers import norm_reason as reason  # noqa: F401
from pyparallel.ops.linear import rows


class _Fused(Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
    ) -> tuple[Tensor, Tensor]:
        record_collective("all_reduce", x.numel() * x.itemsize)
        run, given = group.communicator.peers.all_reduce_residual_rms_norm, (x, residual)
        y, h = group.communicator.call(
            lambda: run(*(rows(t).contiguous() for t in given), weight.contiguous(), eps=eps)
        )
        ctx.save_for_backward(h, weight)
        ctx.eps = eps
        return y.view(x.shape), h.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dx, dweight = ops.rms_norm_backward(rows(dy).contiguous(), h, weight, eps=ctx.eps)
        # h goes on as the next residual: its gradient joins the norm's, and both inputs get the sum.
        total = (dx + rows(dh)).view(dy.shape)
        return total, total, dweight, None, None


def run(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> tuple[Tensor, Tensor]:
    """(y, h): ``h = residual + all_reduce(x)``, ``y = h / rms(h) * weight``. Differentiable.

    Args:
        x: [..., H], this rank's partial sum. residual: [..., H], replicated. weight: [H].
    """
    return _Fused.apply(x, residual, weight, eps, group)
