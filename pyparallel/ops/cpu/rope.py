"""``rope`` on the CPU."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cpu.ops import plain_reason
from pyparallel.native.cpu.ops import rope as run  # noqa: F401


def reason(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why a call can't run here, or None."""
    return plain_reason(x, cos, sin)
