"""``attention`` on Triton, differentiable: flash prefill, and split-KV decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend
from pyparallel.kernels.attention.attention import attention
from pyparallel.kernels.attention.attention_backward import attention_backward
from pyparallel.kernels.attention.attention_decode import attention_decode
from pyparallel.native import FLOATS
from pyparallel.ops.triton import dtype_reason


def reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why a call can't, or should not, run here."""
    # On an H100 cuDNN takes 0.7 of our time forward, 0.8 backward and 0.9 in decoding (docs/gpu.md).
    aligned = not causal or q.shape[1] in (1, k.shape[1])
    if backend.chosen() != "triton" and mask is None and window is None and aligned:
        return "what torch's fused attention is made for is left to it unless triton is asked for"
    if mask is not None and mask.requires_grad:
        return "the kernel gives the mask no gradient"
    if mask is not None and mask.dtype not in (torch.bool, *FLOATS):
        return f"the kernel takes a mask in bool, fp32, fp16 or bf16, not {mask.dtype}"
    return dtype_reason(q)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float | None,
        window: int | None,
        mask: Tensor | None,
    ) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        ctx.options = {"causal": causal, "scale": scale, "window": window, "mask": mask}
        o, lse = attention(q, k, v, **ctx.options)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        grads = attention_backward(grad.contiguous(), q, k, v, o, lse, **ctx.options)
        return *grads, None, None, None, None


def _decode(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    o, _ = attention_decode(q.squeeze(1), k, v, lengths, scale=scale, window=window)
    return o.unsqueeze(1)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Flash attention, ``o[B, S, N, D]``. Differentiable.

    One query a sequence, as in decoding, reads the cache where it lies, cut into splits.
    """
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[1] == 1 and mask is None and not wants_gradient:
        return _decode(q, k, v, scale, window)
    return _Attention.apply(q, k, v, causal, scale, window, mask)
