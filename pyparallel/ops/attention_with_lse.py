"""Attention that also gives the log-sum-exp of its scores, and its gradient from a given one.

Legend: q, o [B, S, N, D]; k, v [B, T, G, D]; lse [B, N, S], natural log, in fp32
(fp64 for fp64 inputs).

    s = scale q k^T where seen, else -inf
    forward   lse = log sum_j exp(s_j),  o = sum_j exp(s_j - lse) v_j
    backward  p = exp(s - lse),  delta = sum_d do o,  ds = p (do v^T - delta)
              dv = p^T do,  dk = scale ds^T q,  dq = scale ds k

The backward takes whatever o and lse it is given. With those of the attention over *all* keys, p is the
share of these keys in the whole, so gradients over parts of the keys simply add up: that is what lets
keys be spread over ranks. A query that sees no key has o = 0 and lse = -inf.
Sources: Dao 2023, "FlashAttention-2", algorithms 1 and 2; Liu et al. 2023, "Ring Attention".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyparallel import reference


def whole_mask(
    q: Tensor, k: Tensor, causal: bool, window: int | None, mask: Tensor | None
) -> Tensor:
    """Every condition as one mask, [1 or B, 1 or N, S, T]."""
    seen = reference.attention_mask(
        q.shape[1], k.shape[1], causal=causal, window=window, device=q.device
    )
    return seen[None, None] if mask is None else seen & mask


def torch_arguments(
    q: Tensor, k: Tensor, causal: bool, window: int | None, mask: Tensor | None
) -> tuple[bool, Tensor | None]:
    """torch's ``is_causal``, which aligns the first query with the first key, or the mask to add."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    all_seen = window is None and mask is None and (not causal or num_queries == 1)
    if all_seen:
        return False, None
    if causal and window is None and mask is None and num_queries == num_keys:
        return True, None
    return False, whole_mask(q, k, causal, window, mask)


def additive(seen: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores, in q's dtype: 0 where a key is seen, else -inf."""
    if seen is None:
        return None
    hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
    return hidden.masked_fill_(~seen, -math.inf).expand(q.shape[0], -1, -1, -1)


def run_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``; arguments as in :func:`pyparallel.reference.attention`, the mask a boolean one.

    On the CPU by torch's flash kernel. Elsewhere by the equations: the GPU kernels come first there.
    Not differentiable by itself: see :mod:`pyparallel.ops.context.ring`.
    """
    if q.device.type != "cpu":
        options = {"causal": causal, "scale": scale, "window": window, "mask": mask}
        return reference.attention(q, k, v, **options)
    # The kernel divides by the number of blocks.
    if q.numel() == 0 or k.numel() == 0:
        return _nothing_seen(q)
    is_causal, seen = torch_arguments(q, k, causal, window, mask)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        0.0,
        is_causal,
        attn_mask=additive(seen, q),
        scale=scale,
    )
    if seen is not None:
        # The kernel calls the log-sum-exp of nothing 0.
        lse = lse.masked_fill(~seen.any(-1), -math.inf)
    return o.transpose(1, 2), lse


def run_reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The equations as they stand, in fp32 (fp64 for fp64 inputs)."""
    return reference.attention(q, k, v, **options)


def _nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, -math.inf, dtype=dtype, device=q.device)
    return torch.zeros_like(q), lse
