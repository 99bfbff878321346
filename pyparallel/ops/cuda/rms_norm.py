"""``rms_norm`` by the CUDA extension (csrc/cuda: rms_norm)."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cuda import ops
from pyparallel.ops.cuda import dtype_reason, flat


def reason(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> str | None:
    """Why a call can't run here, or None."""
    return "the kernels need a weight" if weight is None else dtype_reason(x, weight)


def run(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """See :mod:`pyparallel.ops.rms_norm`. Differentiable."""
    return ops.rms_norm(flat(x), weight, eps=eps).view(x.shape)
