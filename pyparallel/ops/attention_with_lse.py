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

from pyparallel import backend, reference

Gradients = tuple[Tensor, Tensor, Tensor]


def _whole(q: Tensor, k: Tensor, causal: bool, window: int | None, mask: Tensor | None) -> Tensor:
    """Every condition as one mask, [1 or B, 1 or N, S, T]."""
    seen = reference.attention_mask(
        q.shape[1], k.shape[1], causal=causal, window=window, device=q.device
    )
    return seen[None, None] if mask is None else seen & mask


def _torch_arguments(
    q: Tensor, k: Tensor, causal: bool, window: int | None, mask: Tensor | None
) -> tuple[bool, Tensor | None]:
    """torch's ``is_causal``, which aligns the first query with the first key, or the mask to add."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    all_seen = window is None and mask is None and (not causal or num_queries == 1)
    if all_seen:
        return False, None
    if causal and window is None and mask is None and num_queries == num_keys:
        return True, None
    return False, _whole(q, k, causal, window, mask)


def _additive(seen: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if seen is None:
        return None
    hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
    return hidden.masked_fill_(~seen, -math.inf).expand(q.shape[0], -1, -1, -1)


@backend.register("attention_with_lse", "torch")
def attention_with_lse(
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
    Not differentiable by itself: see :mod:`pyparallel.ops.context_parallel_ring`.
    """
    if q.device.type != "cpu":
        options = {"causal": causal, "scale": scale, "window": window, "mask": mask}
        return reference.attention(q, k, v, **options)
    # The kernel divides by the number of blocks.
    if q.numel() == 0 or k.numel() == 0:
        return _nothing_seen(q)
    is_causal, seen = _torch_arguments(q, k, causal, window, mask)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        0.0,
        is_causal,
        attn_mask=_additive(seen, q, k),
        scale=scale,
    )
    if seen is not None:
        # The kernel calls the log-sum-exp of nothing 0.
        lse = lse.masked_fill(~seen.any(-1), -math.inf)
    return o.transpose(1, 2), lse


@backend.register("attention_with_lse_backward", "torch")
def attention_with_lse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """``(dq, dk, dv)`` in the inputs' shapes; o, lse, do: those of all keys, see the equations."""
    if q.device.type != "cpu":
        options = {"causal": causal, "scale": scale, "window": window, "mask": mask}
        return _by_equations(q, k, v, o, lse, do, **options)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    is_causal, seen = _torch_arguments(q, k, causal, window, mask)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do.transpose(1, 2),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        o.transpose(1, 2),
        # Where nothing at all is seen every score is -inf, and exp(-inf - 0) is the 0 that is right.
        lse.masked_fill(lse == -math.inf, 0.0).to(torch.promote_types(q.dtype, torch.float32)),
        0.0,
        is_causal,
        attn_mask=_additive(seen, q, k),
        scale=scale,
    )
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


@backend.register("attention_with_lse", "reference")
def _reference_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.attention(q, k, v, **options)


@backend.register("attention_with_lse_backward", "reference")
def _by_equations(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """The equations as they stand, in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide_q, wide_o, wide_do = (t.to(wide).transpose(1, 2) for t in (q, o, do))
    wide_k, wide_v = (t.to(wide).transpose(1, 2).repeat_interleave(repeats, 1) for t in (k, v))
    seen = _whole(q, k, causal, window, mask)
    scores = (scale * wide_q @ wide_k.transpose(-1, -2)).masked_fill(~seen, -math.inf)
    total = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1).to(wide)
    p = torch.exp(scores - total)
    delta = (wide_do * wide_o).sum(-1, keepdim=True)
    ds = p * (wide_do @ wide_v.transpose(-1, -2) - delta)

    def over_repeats(gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (k.shape[2], repeats)).sum(2).transpose(1, 2)

    dq = (scale * ds @ wide_k).transpose(1, 2).to(q.dtype)
    dk = over_repeats(scale * ds.transpose(-1, -2) @ wide_q).to(k.dtype)
    return dq, dk, over_repeats(p.transpose(-1, -2) @ wide_do).to(v.dtype)


def _takes_triton(
    q: Tensor, k: Tensor, *args: Any, mask: Tensor | None = None, **options: Any
) -> str | None:
    if mask is not None and mask.dtype is not torch.bool:
        return f"expected a boolean mask, got {mask.dtype}"
    if q.dtype == torch.float64:
        return "the kernel has no fp64"
    try:
        from pyparallel.kernels.launch import INTERPRETING
    except ImportError as error:
        return f"triton can't be imported ({error})"
    if q.device.type == "cpu" and not (INTERPRETING and backend.chosen() == "triton"):
        return "CPU tensors run in Triton's interpreter only where that is asked for"
    return None


@backend.register("attention_with_lse", "triton", supports=_takes_triton)
def _triton_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    from pyparallel.kernels.attention.attention import attention

    return attention(q, k, v, **options)


@backend.register("attention_with_lse_backward", "triton", supports=_takes_triton)
def _triton_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, **options: Any
) -> Gradients:
    from pyparallel.kernels.attention.attention_backward import attention_backward

    return attention_backward(do.contiguous(), q, k, v, o, lse, **options)


def _nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, -math.inf, dtype=dtype, device=q.device)
    return torch.zeros_like(q), lse
