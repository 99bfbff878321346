"""``layer_norm`` on Triton, differentiable; ``rms_norm`` shares its autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.kernels.norm.norm import layer_norm, rms_norm
from pyparallel.kernels.norm.norm_backward import norm_backward
from pyparallel.ops.triton import dtype_reason


def reason(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x)


class Norm(Function):
    """LayerNorm, or RMSNorm where nothing is centered."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
    ) -> Tensor:
        x = x.contiguous()
        result = layer_norm(x, weight, bias, eps=eps) if center else rms_norm(x, weight, eps=eps)
        ctx.save_for_backward(x, weight, result.mean, result.rstd)
        ctx.has_bias = bias is not None
        return result.out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grads = norm_backward(grad.contiguous(), x, weight, mean, rstd, has_bias=ctx.has_bias)
        return grads.dx, grads.dweight, grads.dbias, None, None


def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis. Differentiable."""
    return Norm.apply(x, weight, bias, eps, True)
