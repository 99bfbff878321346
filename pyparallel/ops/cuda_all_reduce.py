"""The table's cuda rows that end in a sum over GPUs of one machine, through each other's memory.

    linear_all_reduce             cuBLASLt's matmul, then one peer kernel
    all_reduce_residual_rms_norm  sum, residual and norm in one peer kernel
                                  (csrc/cuda/world/all_reduce_norm.h)

Both have the bits of the plain path, and are offered for messages up to the thresholds of
:mod:`pyparallel.native.cuda.tuning` only: beyond them NCCL is the faster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend
from pyparallel.comm.collectives import record_collective
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.cuda.peers import PeerMemory
from pyparallel.comm.group import Group
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.ops.linear import rows


def _peers_reason(x: Tensor, group: Group) -> str | None:
    """Why the peer kernels cannot run a call on this group, or None."""
    if not x.is_cuda:
        return f"the input is on {x.device.type}"
    if torch.compiler.is_compiling():
        return "not part of a compiled graph"
    if not isinstance(group.communicator, NcclCommunicator):
        return f"the group '{group.communicator.name}' does not run on our NCCL communicator"
    if group.communicator.peers is None:
        return f"the ranks of '{group.communicator.name}' do not address one another's memory"
    if not group.communicator.deterministic:
        return "sums in rank order are not asked for"
    missing = cuda_extension.missing()
    return missing[0] if missing else None


def linear_reason(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> str | None:
    """Why :func:`linear_all_reduce` cannot, or should not, run a call."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return "expected one dtype"
    num_bytes = x.shape[:-1].numel() * weight.shape[0] * x.itemsize
    return PeerMemory.reason_against_sum(x.dtype, num_bytes) or _peers_reason(x, group)


@backend.register("linear_all_reduce", "cuda", supports=linear_reason)
def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``y[..., M] = all_reduce(x w^T) + b``. No autograd."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    record_collective("all_reduce", y.numel() * y.itemsize)
    if y.numel() == 0:
        return y
    torch.mm(rows(x), weight.t(), out=rows(y))
    group.communicator.call(group.communicator.peers.all_reduce, y, "sum")
    return y if bias is None else y.add_(bias)


def norm_reason(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: Group
) -> str | None:
    """Why :func:`all_reduce_residual_rms_norm` cannot, or should not, run a call."""
    if weight is None:
        return "the kernel needs a weight"
    return PeerMemory.reason_against_norm(x, residual, weight) or _peers_reason(x, group)


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
        from pyparallel.native.cuda import ops as cuda_ops

        h, weight = ctx.saved_tensors
        dx, dweight = cuda_ops.rms_norm_backward(rows(dy).contiguous(), h, weight, eps=ctx.eps)
        # h goes on as the next residual: its gradient joins the norm's, and both inputs get the sum.
        total = (dx + rows(dh)).view(dy.shape)
        return total, total, dweight, None, None


@backend.register("all_reduce_residual_rms_norm", "cuda", supports=norm_reason)
def all_reduce_residual_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> tuple[Tensor, Tensor]:
    """(y, h): ``h = residual + all_reduce(x)``, ``y = h / rms(h) * weight``. Differentiable.

    Args:
        x: [..., H], this rank's partial sum. residual: [..., H], replicated. weight: [H].
    """
    return _Fused.apply(x, residual, weight, eps, group)
