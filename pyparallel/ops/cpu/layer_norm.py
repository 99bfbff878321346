"""``layer_norm`` on the CPU."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cpu.ops import layer_norm as run  # noqa: F401
from pyparallel.native.cpu.ops import plain_reason


def reason(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> str | None:
    """Why a call can't run here, or None."""
    return "expected a weight" if weight is None else plain_reason(x, weight, bias)
