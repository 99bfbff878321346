"""Attention over all keys from attention over parts of them.

    lse = log(exp(lse_a) + exp(lse_b)),   o = o_a exp(lse_a - lse) + o_b exp(lse_b - lse)

in fp32, parts in the order in which they come. A part that sees nothing (o = 0, lse = -inf) changes no
bit. Source: Dao et al. 2022, "FlashAttention", section 3.1 (the softmax of two blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention_(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    """Merge a part into ``o [B, S, N, D]`` (fp32) and ``lse [B, N, S]``, in place."""
    total = torch.logaddexp(lse, part_lse)
    # -inf less -inf is no number: where nothing has been seen yet, both weights are 0.
    base = total.masked_fill(total == -math.inf, 0.0)
    keep = torch.exp(lse - base).transpose(1, 2).unsqueeze(-1)
    add = torch.exp(part_lse - base).transpose(1, 2).unsqueeze(-1)
    o.mul_(keep).addcmul_(part_o.to(o.dtype), add)
    lse.copy_(total)


def merge_all(parts_o: Sequence[Tensor], parts_lse: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All parts merged, in order, as new tensors of the parts' dtype: fp32 or fp64."""
    o, lse = parts_o[0].clone(), parts_lse[0].clone()
    for part_o, part_lse in zip(parts_o[1:], parts_lse[1:], strict=True):
        merge_attention_(o, lse, part_o, part_lse)
    return o, lse
