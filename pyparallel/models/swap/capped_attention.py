"""transformers' attention with capped scores, as Gemma 2 has it, with the op ``softcap`` in its middle.

    o = softmax(cap tanh(q k^T scale / cap) + mask) v

transformers runs such models by plain matmuls, since fused attention knows no cap; so does this, step by
step the same, but that the cap is one pass of whatever backend the table finds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyparallel.ops.softcap import softcap as capped

NAME = "pyparallel_capped"


def capped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """``query [B, N_r, S, D]``, ``key, value [B, G_r, T, D]`` to [B, S, N_r, D] and the weights.

    attention_mask: what is added to the scores, or, boolean, which of them count; [B, 1, S, T].
    """
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) if group > 1 else t for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = capped(scores, softcap)
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def use_capped_attention(model: nn.Module) -> None:
    """Let a transformers model whose config caps its scores use :func:`capped_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    config = getattr(model, "config", None)
    if getattr(config, "attn_logit_softcapping", None) is None:
        return
    if getattr(config, "_attn_implementation", None) != "eager":
        return
    if not getattr(model, "_supports_attention_backend", False):
        return
    AttentionInterface.register(NAME, capped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
