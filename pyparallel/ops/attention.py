"""Softmax attention on this rank's heads; see :func:`pyparallel.reference.attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel import reference


def run_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``o[B, S, N, D] = softmax(scale q k^T) v`` by torch's fused kernels. Differentiable.

    mask: see :func:`pyparallel.reference.attention`.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    # torch's is_causal aligns the first query with the first key; here the last ones are aligned.
    square = causal and window is None and mask is None and num_queries == num_keys
    all_seen = window is None and (not causal or num_queries == 1)
    if not square and not all_seen:
        seen = reference.attention_mask(
            num_queries, num_keys, causal=causal, window=window, device=q.device
        )
        if mask is None:
            mask = seen
        elif mask.dtype is torch.bool:
            mask = seen & mask
        else:
            mask = mask.masked_fill(~seen, -math.inf)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def run_reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same, in fp32."""
    return reference.attention(q, k, v, **options)[0]
