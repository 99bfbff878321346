"""``cross_entropy_statistics`` by the CUDA extension (csrc/cuda: cross_entropy)."""

from __future__ import annotations

from torch import Tensor

from pyparallel.native.cuda import ops
from pyparallel.ops.cuda import dtype_reason


def reason(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(logits)


def run(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> Tensor:
    """See :mod:`pyparallel.ops.cross_entropy_statistics`."""
    return ops.cross_entropy_statistics(logits, targets, start=start, ignored=ignore_index)
