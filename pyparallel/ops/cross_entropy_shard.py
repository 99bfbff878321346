"""What cross-entropy needs of one rank's columns of the logits: their statistics, and their gradient.

Legend: T tokens, V vocabulary, V_r this rank's part, e smoothing, z the weight of the z-loss.

    statistics  m = max logit, s = sum exp(logit - m), t = the target's logit (0 if it is not here),
                a = sum (logit - m); m counts as 0 where it is -inf
    gradient    dlogit = dloss ((1 + 2 z (M + L)) exp(logit - M - L) - (1 - e) [v = target] - e / V)
                M + L = lse, in two parts: what the dtype holds of it, and the rest

How ranks join these is in :mod:`pyparallel.ops.vocab_parallel_cross_entropy`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pyparallel import backend

# Elements of a block of rows: its fp32 temporaries stay in the cache, and small beside the logits.
BLOCK = 1 << 18


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, BLOCK // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


@backend.register("cross_entropy_statistics", "torch")
@backend.register("cross_entropy_statistics", "reference")
def statistics(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> Tensor:
    """``[T, 4]`` = (m, s, t, a) of ``logits [T, V_r]``, the ids from ``start`` on."""
    found = torch.zeros(logits.shape[0], 4, dtype=_wide(logits.dtype), device=logits.device)
    if logits.shape[1] == 0:
        found[:, 0] = -torch.inf
        return found
    local = targets - start
    here = (local >= 0) & (local < logits.shape[1]) & (targets != ignore_index)
    local = local.masked_fill(~here, 0).unsqueeze(1)
    for rows in _blocks(logits):
        x = logits[rows].to(found.dtype)
        out = found[rows]
        out[:, 0] = x.amax(1)
        # A row of -inf alone: subtracting it from itself would give NaN.
        base = out[:, :1].masked_fill(out[:, :1].isneginf(), 0.0)
        out[:, 2] = x.gather(1, local[rows]).squeeze(1).masked_fill(~here[rows], 0.0)
        x = x - base
        out[:, 3] = x.sum(1)
        out[:, 1] = x.exp_().sum(1)
    return found


@backend.register("cross_entropy_gradient_", "torch")
@backend.register("cross_entropy_gradient_", "reference")
def gradient_(
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
    for rows in _blocks(logits):
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


def _triton_reason(logits: Tensor, *_: object) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if logits.dtype == torch.float64:
        return "the kernels take no float64"
    if logits.is_cuda:
        return None
    from pyparallel.kernels.launch import INTERPRETING

    asked = INTERPRETING and backend.chosen() == "triton"
    return None if asked and logits.is_cpu else f"the logits are on {logits.device.type}"


@backend.register("cross_entropy_statistics", "triton", supports=_triton_reason)
def _triton_statistics(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> Tensor:
    from pyparallel.kernels.loss.cross_entropy import cross_entropy_statistics

    return cross_entropy_statistics(
        logits, targets, vocab_start=start, ignore_index=ignore_index, centered=True
    )


@backend.register("cross_entropy_gradient_", "triton", supports=_triton_reason)
def _triton_gradient_(
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
    from pyparallel.kernels.loss.cross_entropy import cross_entropy_backward_

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
