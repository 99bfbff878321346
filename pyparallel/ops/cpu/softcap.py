"""``softcap`` on the CPU, differentiable: one pass forward, one backward, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from pyparallel import _C
from pyparallel.native.cpu.ops import plain_reason
from pyparallel.native.cpu.weights import PRECISIONS


def reason(x: Tensor, cap: float) -> str | None:
    """Why a call can't run here, or None."""
    with torch.no_grad():
        return plain_reason(x)


class _Softcap(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cap: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.cap = cap
        y = torch.empty(x.shape, dtype=x.dtype)
        numbers = (cap, PRECISIONS[x.dtype], x.numel())
        _C.cpu_softcap(x.data_ptr(), *numbers, y.data_ptr(), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient is to be differentiated again, which the kernel is not.
            return grad * (1.0 - torch.tanh(x / ctx.cap).square()), None
        grad, dx = grad.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        numbers = (x.data_ptr(), ctx.cap, PRECISIONS[x.dtype], x.numel())
        _C.cpu_softcap_backward(grad.data_ptr(), *numbers, dx.data_ptr(), torch.get_num_threads())
        return dx, None


def run(x: Tensor, cap: float) -> Tensor:
    """``cap tanh(x / cap)``. Differentiable."""
    return _Softcap.apply(x, cap)
