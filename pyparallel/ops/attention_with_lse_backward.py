"""The gradient of attention from a given o and lse; see :mod:`pyparallel.ops.attention_with_lse` for the
equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyparallel.autocast import as_written
from pyparallel.ops.attention_with_lse import additive, torch_arguments, whole_mask

Gradients = tuple[Tensor, Tensor, Tensor]


def run_torch(
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
        return run_reference(q, k, v, o, lse, do, **options)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    is_causal, seen = torch_arguments(q, k, causal, window, mask)
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
        attn_mask=additive(seen, q),
        scale=scale,
    )
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


@as_written
def run_reference(
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
    seen = whole_mask(q, k, causal, window, mask)
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
