"""transformers' attention through the backend table, for models that parallelize() has cut.

Where nothing is dropped, ``model.generate`` and its own caches thus run on the kernels that the table
finds: where no mask is needed beside the causal one, as in decoding and in reading one prompt, and with
a mask where a backend has a kernel for it. Every other call is transformers' SDPA attention, as it was
before.

A static cache hands out all its slots, and a mask that hides those still empty. :func:`own_mask` notes
on such a mask how many slots it shows; attention then reads these alone. Prompts of several lengths are
padded on the left: the note then also says where each row starts, and every row is read from there, by
itself. Padding queries, whose results nobody reads, get zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel import autocast, backend
from pyparallel.ops.attention import run_torch as torch_attention

NAME = "pyparallel"

# The attributes of a mask that say how many slots it shows, and where each row's first one is.
FILLED = "pyparallel_filled_slots"
STARTS = "pyparallel_first_slots"

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
    filled = _filled_slots(query.shape[2], key.shape[2], attention_mask, causal)
    if autocast.is_on():
        query, key, value = autocast.lowered(query, key, value)
    plain = not dropout and not any(kwargs.get(k) for k in OTHER)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if plain and filled is not None:
        k, v = k[:, :filled], v[:, :filled]
        how = {"causal": query.shape[2] > 1, "scale": scaling}
        starts = getattr(attention_mask, STARTS, None)
        if starts is not None:
            return _padded_on_the_left(q, k, v, starts, **how), None
        return backend.call("attention", q, k, v, **how).contiguous(), None
    if plain and attention_mask is not None:
        # transformers' masks are complete: they have the causal one and the window in them.
        masked = {"scale": scaling, "mask": attention_mask[..., : key.shape[2]]}
        run = backend.select("attention", q, k, v, **masked)
        # torch's kernel is SDPA, which transformers calls with the heads packed best.
        if run is not torch_attention:
            return run(q, k, v, **masked).contiguous(), None
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)


def _padded_on_the_left(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], **how: Any
) -> Tensor:
    """[B, S, N_r, D]: row b attends to its keys from ``starts[b]`` on; padding queries give zeros."""
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    before = k.shape[1] - q.shape[1]
    for row, start in enumerate(starts):
        first = max(start - before, 0)
        rows = slice(row, row + 1)
        o[rows, first:] = backend.call(
            "attention", q[rows, first:], k[rows, start:], v[rows, start:], **how
        )
    return o


def _filled_slots(length: int, slots: int, mask: Tensor | None, causal: bool) -> int | None:
    """How many slots ``length`` queries see, the last query all of them; None where a mask says more."""
    if mask is not None:
        return getattr(mask, FILLED, None)
    if length == 1:
        return slots
    # SDPA's causal mask lets the first query stand at the first slot.
    return min(length, slots) if causal else None


def own_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """transformers' mask for SDPA, with a note where it is causal and hides nothing but empty slots."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **options,
    )
    # Reading a position would break a graph, or make a device wait.
    if mask is None or not mask.is_cpu or torch.compiler.is_compiling():
        return mask
    plain = mask_function in (None, causal_mask_function) and not use_vmap and kv_offset == 0
    filled = int(q_offset) + q_length
    starts = _first_slots(attention_mask, filled) if plain else None
    if starts is not None:
        # generate() makes masks contiguous, which would be another tensor.
        mask = mask.contiguous()
        setattr(mask, FILLED, filled)
        if any(starts):
            setattr(mask, STARTS, starts)
    return mask


def _first_slots(padding: Tensor | None, filled: int) -> tuple[int, ...] | None:
    """Where each row of a [B, T] mask starts; None if it hides anything after that, or a whole row."""
    if padding is None:
        return ()
    seen = padding[:, :filled].bool()
    starts = seen.int().argmax(1)
    if bool((seen.sum(1) + starts == seen.shape[1]).all()) and bool(seen.any(1).all()):
        return tuple(starts.tolist())
    return None


def use_own_attention(model: nn.Module) -> None:
    """Let a transformers model that uses SDPA attention use :func:`own_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    if not getattr(model, "_supports_attention_backend", False):
        return
    AttentionInterface.register(NAME, own_attention)
    AttentionMaskInterface.register(NAME, own_mask)
    model.set_attn_implementation(NAME)
