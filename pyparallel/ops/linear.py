"""The dense matmul. Its gradients, where nothing is summed over ranks, are ops of their own.

``y[..., M] = x[..., K] w[M, K]^T + b[M]``;  ``dx = dy w``;  ``dw = dy^T x``;  ``db = sum dy``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel import backend, reference


def run_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x w^T + b``. Differentiable."""
    return F.linear(x, weight, bias)


run_reference = reference.linear


def linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = x w^T + b``, in place where torch multiplies and the rows of ``out`` are dense.

    Args:
        x: [..., K]. out: [..., M], of any strides.
    """
    run = backend.select("linear", x, weight, bias)
    if run is not run_torch or not out.is_contiguous() or x.numel() == 0:
        out.copy_(run(x, weight, bias))
    elif bias is None:
        torch.mm(rows(x), weight.t(), out=rows(out))
    else:
        torch.addmm(bias, rows(x), weight.t(), out=rows(out))


def bias_grad(grad: Tensor) -> Tensor:
    """``db[M] = sum dy[..., M]`` over the leading axes, in fp32."""
    wide = torch.float32 if grad.itemsize < 4 else grad.dtype
    return rows(grad).sum(0, dtype=wide).to(grad.dtype)


def rows(x: Tensor) -> Tensor:
    """``x[..., K]`` as a matrix; a vector is one row."""
    # Not reshape(-1, K): a shard may have no features, and -1 is then ambiguous.
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
