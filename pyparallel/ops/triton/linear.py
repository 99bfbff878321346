"""``linear`` on Triton, differentiable: matmul forward, and one kernel for all gradients backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend
from pyparallel.kernels.matmul.matmul_backward import matmul_backward
from pyparallel.kernels.matmul.matmul_descriptor import matmul_on_best_path
from pyparallel.ops.triton import dtype_reason, flat


def reason(x: Tensor, *_: Any) -> str | None:
    """Why a call can't run here, or None; also of the matmuls of the gradients."""
    if backend.chosen() != "triton":
        return "a plain matmul is left to torch unless triton is asked for"
    return dtype_reason(x)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = matmul_on_best_path(flat(x), weight, bias=bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = dict(zip(("need_dx", "need_dw", "need_dbias"), ctx.needs_input_grad, strict=True))
        dx, dw, db = matmul_backward(flat(grad), flat(x), weight, **wanted)
        return None if dx is None else dx.view(x.shape), dw, db


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[..., M] = x[..., K] w[M, K]^T + b[M]``. Differentiable."""
    return _Linear.apply(x, weight, bias)
