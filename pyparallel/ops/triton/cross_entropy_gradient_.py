"""``cross_entropy_gradient_`` on Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyparallel.kernels.loss.cross_entropy import cross_entropy_backward_
from pyparallel.ops.triton import dtype_reason


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
    if z_loss:
        # f exp(x - lse) = exp(x - (lse - log f)): the kernel needs no factor of its own. f is positive
        # while lse > -1 / (2 z), and no loss that is being minimised goes there.
        whole = lse if base is None else base + lse
        lse = lse - torch.log(1.0 + 2.0 * z_loss * whole)
    return cross_entropy_backward_(
        logits,
        targets,
        lse,
        grad,
        base=base,
        vocab_size=vocab_size,
        vocab_start=start,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
