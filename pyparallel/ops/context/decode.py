"""Attention of a few tokens, known to all ranks, over keys that are spread over them.

Legend: q, o [B, S, N, D], replicated; k_r, v_r [B, T_r, G, D], the slots of rank r.

    (o_r, lse_r) = attention(q, k_r, v_r)
    o = merge over ranks of (o_r, lse_r), in rank order, in fp32: every rank gets the same bits

Communication: one all-gather of B S N (D + 1) fp32 numbers a rank, whatever the context's length.
Source: the split of Dao et al. 2023, "Flash-Decoding", over ranks instead of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import autocast, backend
from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group import Group
from pyparallel.ops.context.block_attention import wide
from pyparallel.ops.context.merge_attention import merge_all


def context_parallel_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``o`` of ``q`` over the keys of all ranks, on every rank.

    Args:
        q: [B, S, N, D], the same on all ranks. k, v: [B, T_r, G, D], perhaps of no slots.
        mask: [B, 1 or N, S, T_r], true where a query sees a key; None where it sees all.
    """
    if autocast.is_on():
        q, k, v = autocast.lowered(q, k, v)
    o, lse = backend.call("attention_with_lse", q, k, v, scale=scale, mask=mask)
    part = torch.cat([o.to(wide(q.dtype)), lse.transpose(1, 2).unsqueeze(-1)], -1)
    parts = all_gather_raw(part.unsqueeze(0), group)
    o, _ = merge_all(
        [part[..., :-1] for part in parts], [part[..., -1].transpose(1, 2) for part in parts]
    )
    return o.to(q.dtype)
