"""``cross_entropy_gradient_`` by the CUDA extension (csrc/cuda: cross_entropy)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyparallel.native.cuda import ops
from pyparallel.ops.cuda import dtype_reason


def reason(logits: Tensor, *_: Any) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(logits)


def run(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    base: Tensor | None = None,
) -> Tensor:
    """See :mod:`pyparallel.ops.cross_entropy_gradient_`."""
    return ops.cross_entropy_gradient_(
        logits,
        targets,
        lse,
        grad,
        start=start,
        vocab=vocab_size,
        ignored=ignore_index,
        smoothing=label_smoothing,
        z_loss=z_loss,
        base=base,
    )
