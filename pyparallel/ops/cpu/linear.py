"""``linear`` on the CPU: ``y[..., M] = x[..., K] w[M, K]^T + b[M]``, weights read in their own dtype."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cpu.ops import linear as run  # noqa: F401
from pyparallel.native.cpu.ops import plain_reason


def reason(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a call can't run here, or None."""
    if not weight.is_contiguous():
        return "expected a contiguous weight"
    return plain_reason(x, weight, bias)
