"""``layer_norm`` by the CUDA extension (csrc/cuda: layer_norm)."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cuda import ops
from pyparallel.ops.cuda import dtype_reason, flat


def reason(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> str | None:
    """Why a call can't run here, or None."""
    return "the kernels need a weight" if weight is None else dtype_reason(x, weight, bias)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """See :mod:`pyparallel.ops.layer_norm`. Differentiable."""
    return ops.layer_norm(flat(x), weight, bias, eps=eps).view(x.shape)
