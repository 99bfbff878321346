"""``rope`` on Triton, differentiable: the gradient is the rotation back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.kernels.elementwise.rope import rope
from pyparallel.ops.triton import dtype_reason


def reason(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x)


class _Rope(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grad, *ctx.saved_tensors, True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    positions = None
    if cos.dim() == 3:
        # A table for each sequence of the batch: one long table, and where each token's row is.
        b, s = cos.shape[:2]
        positions = torch.arange(b * s, device=x.device).view(b, s)
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        positions = positions.expand(x.shape[0], s).contiguous() if b == 1 else positions
    return rope(
        x.contiguous(), cos.contiguous(), sin.contiguous(), positions=positions, inverse=inverse
    )


def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x[B, S, N, D]``; ``cos, sin [S, E]`` or ``[B, S, E]``. Differentiable in x."""
    return _Rope.apply(x, cos, sin)
