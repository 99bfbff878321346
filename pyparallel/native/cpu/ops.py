"""The CPU kernels as functions on tensors: checks and conversions.

What runs is in ``csrc/cpu``. Activations are fp32 inside: tensors of half precision are widened on the
way in and rounded once on the way out; weights and the cache are read in their own dtype. Nothing here
is differentiable; the table takes these only where no gradient is wanted.

Legend: M rows, K inputs, N outputs or query heads, G key/value heads, B batch, S queries, T keys, D head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import _C
from pyparallel.cut.quantize import PackedWeight
from pyparallel.native import FLOATS
from pyparallel.native.cpu.weights import PRECISIONS, expect, form, weight_argument, widened

# Their numbers, by the names of csrc/core/activation.h; none is None here.
ACTIVATIONS = {None if name == "none" else name: code for name, code in _C.ACTIVATIONS.items()}

PLAIN_TYPES = (Tensor, torch.nn.Parameter)

# Up to this many rows a matmul reads the weights in place, bound by memory.
MAX_THIN_ROWS = 16


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    up: Tensor | PackedWeight | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    thin: bool | None = None,
    threads: int | None = None,
) -> Tensor:
    """``y = act(x w^T + b) [* (x up^T + up_bias)] [+ residual]`` in one pass.

    Args:
        x: [..., K]; residual: [..., N]; y has x's dtype.
        weight, up: [N, K], dense rows; fp32, bf16, fp16, or packed.
        thin: the kernel for few rows (at most 16), or the one for many; by default as x has.
        threads: by default torch's number.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    N, K = weight.shape
    expect(x.shape[-1] == K, "x", f"[..., {K}]", tuple(x.shape))
    lead = x.shape[:-1]
    rows, M = widened(x), lead.numel()
    y = torch.empty(*lead, N)
    if thin is None:
        thin = M <= MAX_THIN_ROWS
    if thin and M > MAX_THIN_ROWS:
        raise ValueError(f"thin: expected at most {MAX_THIN_ROWS} rows, got {M}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {activation!r}")
    held: list[Tensor] = []
    weights = weight_argument("weight", weight, bias, held)
    gates = () if up is None else weight_argument("up", up, up_bias, held)
    if up is not None:
        expect(up.shape == weight.shape, "up", tuple(weight.shape), tuple(up.shape))
        expect(form(up) == form(weight), "up", form(weight), form(up))
    if residual is not None:
        shape = (*lead, N)
        expect(residual.shape == shape, "residual", shape, tuple(residual.shape))
        held.append(widened(residual))
    if M and N:
        _C.cpu_linear(
            rows.data_ptr(),
            K,
            M,
            K,
            N,
            weights,
            gates,
            ACTIVATIONS[activation],
            0 if residual is None else held[-1].data_ptr(),
            y.data_ptr(),
            # Rounding x to bf16 loses nothing where it comes in bf16.
            x.dtype is torch.bfloat16,
            thin,
            threads or torch.get_num_threads(),
        )
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """``o [B, S, N, D] = softmax(scale q k^T) v``; the last query stands at the last key.

    Args:
        q: [B, S, N, D]; k, v: [B, T, G, D] in one dtype, with dense rows of D in a common layout,
            such as a cache's [B, G, T, D] transposed; they are read in place.
        causal: what there is, but for S = 1; mask: there is none.
        window: how many keys, its own included, a query sees.

    Raises:
        ValueError: see :func:`attention_reason`.
    """
    reason = attention_reason(q, k, v, causal=causal, window=window, mask=mask)
    if reason is not None:
        raise ValueError(f"attention: {reason}")
    (B, S, N, D), (_, T, G, _) = q.shape, k.shape
    scaled = widened(q) * (D**-0.5 if scale is None else scale)
    out = torch.empty(B, S, N, D)
    _C.cpu_attention(
        scaled.data_ptr(),
        B,
        S,
        N,
        D,
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0),
        k.stride(2),
        k.stride(1),
        PRECISIONS[k.dtype],
        G,
        T - S,
        window or 0,
        out.data_ptr(),
        threads or torch.get_num_threads(),
    )
    return out.to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, threads: int | None = None) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
    n = x.shape[-1]
    expect(weight.shape == (n,), "weight", (n,), tuple(weight.shape))
    wide, weight, y = widened(x), widened(weight), torch.empty(x.shape)
    count = threads or torch.get_num_threads()
    _C.cpu_rms_norm(
        wide.data_ptr(), weight.data_ptr(), eps, x.numel() // max(n, 1), n, y.data_ptr(), count
    )
    return y.to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *, threads: int | None = None
) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis."""
    n = x.shape[-1]
    expect(weight.shape == (n,), "weight", (n,), tuple(weight.shape))
    wide, weight, y = widened(x), widened(weight), torch.empty(x.shape)
    bias = None if bias is None else widened(bias)
    _C.cpu_layer_norm(
        wide.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        x.numel() // max(n, 1),
        n,
        y.data_ptr(),
        threads or torch.get_num_threads(),
    )
    return y.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, threads: int | None = None) -> Tensor:
    """``x [B, S, N, D]`` with its first 2E features rotated; ``cos, sin [S, E]`` or ``[B, S, E]``."""
    B, S, N, D = x.shape
    half = cos.shape[-1]
    expect(2 * half <= D, "cos", f"at most {D // 2} angles", half)
    angles = (widened(t.expand(B, S, half)) for t in (cos, sin))
    cos, sin = (t.contiguous() for t in angles)
    y = x.float().clone(memory_format=torch.contiguous_format)
    count = threads or torch.get_num_threads()
    _C.cpu_rope(y.data_ptr(), cos.data_ptr(), sin.data_ptr(), B * S, N, D, 2 * half, count)
    return y.to(x.dtype)


def attention_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> str | None:
    """Why :func:`attention` can't run a call, or None."""
    if mask is not None:
        return "expected no mask beside the causal one"
    if q.shape[1] > k.shape[1] or (q.shape[1] > 1 and not causal):
        return "expected causal attention of S <= T queries"
    if window is not None and not causal and q.shape[1] > 1:
        return "expected a window to be causal"
    if k.dtype not in PRECISIONS or v.dtype is not k.dtype:
        return f"expected keys and values in fp32, bf16 or fp16, got {k.dtype} and {v.dtype}"
    if k.shape != v.shape or k.stride() != v.stride() or k.stride(3) != 1:
        return "expected keys and values in one layout with dense rows"
    if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        return f"expected N a multiple of G and one D, got {tuple(q.shape)} and {tuple(k.shape)}"
    return None


def plain_reason(*tensors: Tensor | None) -> str | None:
    """Why tensors can't go to a kernel that knows no gradients, devices or graphs."""
    if torch.compiler.is_compiling():
        return "not part of a compiled graph"
    grad_enabled = torch.is_grad_enabled()
    # One plain loop: this is asked for every call of every layer.
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return "expected CPU tensors"
        if type(tensor) not in PLAIN_TYPES:
            return "expected plain tensors"
        if grad_enabled and tensor.requires_grad:
            return "it is not differentiable; use torch.no_grad() or torch.inference_mode()"
        if tensor.dtype not in FLOATS:
            return "expected fp32, bf16 or fp16"
    return None
