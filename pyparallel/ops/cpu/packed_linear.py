"""``packed_linear`` on the CPU: the weight's few bits are read in place and unpacked in registers."""

from __future__ import annotations

from torch import Tensor

from pyparallel.cut.quantize import PackedWeight
from pyparallel.native.cpu.ops import linear as run  # noqa: F401
from pyparallel.native.cpu.ops import plain_reason


def reason(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> str | None:
    """Why a call can't run here, or None."""
    if not weight.data.is_cpu or not weight.data.is_contiguous():
        return "expected a contiguous weight on the CPU"
    return plain_reason(x, weight.scale, bias)
