"""``cross_entropy_statistics`` on Triton."""

from __future__ import annotations

from torch import Tensor

from pyparallel.kernels.loss.cross_entropy import cross_entropy_statistics
from pyparallel.ops.triton import dtype_reason


def reason(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(logits)


def run(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> Tensor:
    """See :mod:`pyparallel.ops.cross_entropy_statistics`."""
    return cross_entropy_statistics(
        logits, targets, vocab_start=start, ignore_index=ignore_index, centered=True
    )
