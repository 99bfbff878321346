"""transformers' attention through the backend table, for models that parallelize() has cut.

Where nothing is dropped, ``model.generate`` and its own caches thus run on the kernels that the table
finds: where no mask is needed beside the causal one, as in decoding and in reading one prompt, and with
a mask where a backend has a kernel for it. Every other call is transformers' SDPA attention, as it was
before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyparallel import backend, cpu_ops  # noqa: F401
from pyparallel.functional.attention import attention as torch_attention

NAME = "pyparallel"

# Arguments that change what attention computes.
OTHER = ("softcap", "position_bias", "cache", "s_aux", "output_attentions")


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [B, N_r, S, D]``, ``key, value [B, G_r, T, D]`` to [B, S, N_r, D], as SDPA would."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    plain = not dropout and not any(kwargs.get(k) for k in OTHER)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if plain and attention_mask is not None:
        # transformers' masks are complete: they have the causal one and the window in them.
        masked = {"scale": scaling, "mask": attention_mask[..., : key.shape[2]]}
        run = backend.select("attention", q, k, v, **masked)
        # torch's kernel is SDPA, which transformers calls with the heads packed best.
        if run is not torch_attention:
            return run(q, k, v, **masked).contiguous(), None
    elif plain and (length == 1 or (causal and length == key.shape[2])):
        o = backend.call("attention", q, k, v, causal=length > 1, scale=scaling)
        return o.contiguous(), None
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)


def use_own_attention(model: nn.Module) -> None:
    """Let a transformers model that uses SDPA attention use :func:`own_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    if not getattr(model, "_supports_attention_backend", False):
        return
    AttentionInterface.register(NAME, own_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
