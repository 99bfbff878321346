"""The gradient of cross-entropy in one rank's columns of the logits, written over them; see
:mod:`pyparallel.ops.cross_entropy_statistics` for the equation."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.ops.cross_entropy_statistics import blocks


def run_torch(
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
    """``logits [T, V_r]`` overwritten with their gradient; ``grad [T]`` is the loss's.

    Args:
        lse, base: L and M, [T]; without M, L is the whole log-sum-exp.
    """
    width = logits.shape[1]
    if width == 0:
        return logits
    whole = lse if base is None else base + lse
    local = targets - start
    here = (local >= 0) & (local < width)
    local = local.masked_fill(~here, 0).unsqueeze(1)
    taken = torch.where(here, label_smoothing - 1.0, 0.0).to(lse.dtype).unsqueeze(1)
    ignored = (targets == ignore_index).unsqueeze(1)
    for rows in blocks(logits):
        x = logits[rows]
        # In place where the logits are wide themselves; else in a block of fp32.
        y = x if x.dtype == lse.dtype else x.to(lse.dtype)
        if base is not None:
            y.sub_(base[rows].unsqueeze(1))
        y.sub_(lse[rows].unsqueeze(1)).exp_()
        if z_loss:
            y.mul_(1.0 + 2.0 * z_loss * whole[rows].unsqueeze(1))
        if label_smoothing:
            y.sub_(label_smoothing / vocab_size)
        y.scatter_add_(1, local[rows], taken[rows])
        y.mul_(grad[rows].unsqueeze(1))
        # Not a product with 0: an ignored row's logits may be infinite.
        y.masked_fill_(ignored[rows], 0.0)
        if y is not x:
            x.copy_(y)
    return logits


run_reference = run_torch
