"""``softcap`` on Triton, differentiable: one pass forward, one backward, rounded once."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.kernels.elementwise.softcap import softcap, softcap_backward
from pyparallel.ops.triton import dtype_reason


def reason(x: Tensor, cap: float) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x)


class _Softcap(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cap: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.cap = cap
        return softcap(x, cap=cap)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return softcap_backward(grad.contiguous(), x, cap=ctx.cap), None


def run(x: Tensor, cap: float) -> Tensor:
    """``cap tanh(x / cap)``. Differentiable."""
    return _Softcap.apply(x, cap)
