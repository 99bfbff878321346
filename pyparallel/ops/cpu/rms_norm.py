"""``rms_norm`` on the CPU: one pass over a row for its sum of squares, one to write it."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cpu.ops import plain_reason
from pyparallel.native.cpu.ops import rms_norm as run  # noqa: F401


def reason(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> str | None:
    """Why a call can't run here, or None."""
    return "expected a weight" if weight is None else plain_reason(x, weight)
