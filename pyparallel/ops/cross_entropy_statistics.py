"""What cross-entropy needs of one rank's columns of the logits: their statistics, and their gradient.

Legend: T tokens, V vocabulary, V_r this rank's part, e smoothing, z the weight of the z-loss.

    statistics  m = max logit, s = sum exp(logit - m), t = the target's logit (0 if it is not here),
                a = sum (logit - m); m counts as 0 where it is -inf
    gradient    dlogit = dloss ((1 + 2 z (M + L)) exp(logit - M - L) - (1 - e) [v = target] - e / V)
                M + L = lse, in two parts: what the dtype holds of it, and the rest

How ranks join these is in :mod:`pyparallel.ops.vocab_parallel_cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a block of rows: its fp32 temporaries stay in the cache, and small beside the logits.
BLOCK = 1 << 18


def blocks(logits: Tensor) -> list[slice]:
    """Rows that are worked on at a time."""
    rows = max(1, BLOCK // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def run_torch(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> Tensor:
    """``[T, 4]`` = (m, s, t, a) of ``logits [T, V_r]``, the ids from ``start`` on."""
    found = torch.zeros(logits.shape[0], 4, dtype=_wide(logits.dtype), device=logits.device)
    if logits.shape[1] == 0:
        found[:, 0] = -torch.inf
        return found
    local = targets - start
    here = (local >= 0) & (local < logits.shape[1]) & (targets != ignore_index)
    local = local.masked_fill(~here, 0).unsqueeze(1)
    for rows in blocks(logits):
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


run_reference = run_torch
