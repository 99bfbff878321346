"""Attention that drops some of its weights in training, by the place of a weight among all heads'.

    o = dropout(softmax(scale q k^T)) v

The mask is that of the whole [B, N, S, T], so it does not depend on how heads are cut over ranks. Plain
torch: no fused kernel has this mask. Memory [B, N_r, S, T].

Legend: B batch, S queries, T keys, N heads, N_r and G_r this rank's query and key heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyparallel import reference
from pyparallel.ops.dropout import dropout


def attention_with_dropout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    *,
    seed: Tensor,
    num_heads: int,
    first_head: int,
    causal: bool,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``q [B, S, N_r, D]``, ``k, v [B, T, G_r, D]`` to [B, S, N_r, D].

    Args:
        seed: a CPU scalar, int64, alike on all ranks.
        num_heads, first_head: N, and the place of this rank's first head.
        mask: [B or 1, N_r or 1, S, T], true where a query sees a key; joined with the others.
    """
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    seen = reference.attention_mask(
        q.shape[2], k.shape[2], causal=causal, window=window, device=q.device
    )
    seen = seen if mask is None else seen & mask
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).to(q.dtype)
    dropped = dropout(weights.flatten(2), p, seed=seed, length=num_heads, start=first_head)
    return (dropped.view_as(weights) @ v).transpose(1, 2)
