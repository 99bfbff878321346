"""The Triton kernels in the op x backend table, with the gradients that autograd wants of them.

On CUDA and ROCm tensors the automatic choice takes them; a plain matmul it leaves to torch, whose
vendor library is the one to beat there. On CPU tensors they run in Triton's interpreter, and only
where ``triton`` is asked for by name. See the files of pyparallel.kernels for the equations.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(x: Tensor, *_: Any, **__: Any) -> str | None:
    """None, or why the kernels can't run on this tensor here."""
    if x.dtype not in FLOATS:
        return f"the kernels take fp32, fp16 and bf16, not {x.dtype}"
    if not x.is_cuda and backend.chosen() != "triton":
        return f"the tensor is on {x.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x.is_cuda:
        return None
    from pyparallel.kernels.launch import INTERPRETING

    if INTERPRETING and x.device.type == "cpu":
        return None
    return (
        f"the tensor is on {x.device.type}; CPU tensors need the interpreter, which "
        "PYPARALLEL_BACKEND=triton or TRITON_INTERPRET=1 chooses before triton is first imported"
    )


def _matmul_reason(x: Tensor, *_: Any) -> str | None:
    if backend.chosen() != "triton":
        return "a plain matmul is left to torch unless triton is asked for"
    return reason_against(x)


def _attention_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    **_: Any,
) -> str | None:
    # On an H100 cuDNN takes 0.7 of our time forward, 0.8 backward and 0.9 in decoding (docs/gpu.md).
    aligned = not causal or q.shape[1] in (1, k.shape[1])
    if backend.chosen() != "triton" and mask is None and window is None and aligned:
        return "what torch's fused attention is made for is left to it unless triton is asked for"
    if mask is not None and mask.requires_grad:
        return "the kernel gives the mask no gradient"
    if mask is not None and mask.dtype not in (torch.bool, *FLOATS):
        return f"the kernel takes a mask in bool, fp32, fp16 or bf16, not {mask.dtype}"
    return reason_against(q)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


def _matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    from pyparallel.kernels.matmul.matmul_descriptor import matmul_on_best_path

    return matmul_on_best_path(x, w, bias=bias)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul(_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from pyparallel.kernels.matmul.matmul_backward import matmul_backward

        x, weight = ctx.saved_tensors
        wanted = dict(zip(("need_dx", "need_dw", "need_dbias"), ctx.needs_input_grad, strict=True))
        dx, dw, db = matmul_backward(_rows(grad), _rows(x), weight, **wanted)
        return None if dx is None else dx.view(x.shape), dw, db


@backend.register("linear", "triton", supports=_matmul_reason)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[..., M] = x[..., K] w[M, K]^T + b[M]``. Differentiable."""
    return _Linear.apply(x, weight, bias)


@backend.register("linear_dgrad", "triton", supports=_matmul_reason)
def linear_dgrad(grad: Tensor, weight: Tensor) -> Tensor:
    """``dx[..., K] = dy[..., M] w[M, K]``."""
    return _matmul(_rows(grad), weight.t()).view(*grad.shape[:-1], weight.shape[1])


@backend.register("linear_wgrad", "triton", supports=_matmul_reason)
def linear_wgrad(grad: Tensor, x: Tensor) -> Tensor:
    """``dw[M, K] = dy[..., M]^T x[..., K]``."""
    return _matmul(_rows(grad).t(), _rows(x).t())


class _Norm(Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
    ) -> Tensor:
        from pyparallel.kernels.norm.norm import layer_norm, rms_norm

        x = x.contiguous()
        result = layer_norm(x, weight, bias, eps=eps) if center else rms_norm(x, weight, eps=eps)
        ctx.save_for_backward(x, weight, result.mean, result.rstd)
        ctx.has_bias = bias is not None
        return result.out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        from pyparallel.kernels.norm.norm_backward import norm_backward

        x, weight, mean, rstd = ctx.saved_tensors
        grads = norm_backward(grad.contiguous(), x, weight, mean, rstd, has_bias=ctx.has_bias)
        return grads.dx, grads.dweight, grads.dbias, None, None


@backend.register("layer_norm", "triton", supports=reason_against)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis. Differentiable."""
    return _Norm.apply(x, weight, bias, eps, True)


@backend.register("rms_norm", "triton", supports=reason_against)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last axis. Differentiable."""
    return _Norm.apply(x, weight, None, eps, False)


class _Gated(Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
        from pyparallel.kernels.elementwise.gated_activation import gated_activation

        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_activation(gate, up, activation=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from pyparallel.kernels.elementwise.gated_activation import gated_activation_backward

        gate, up = ctx.saved_tensors
        return *gated_activation_backward(grad.contiguous(), gate, up, activation=ctx.kind), None


@backend.register("activation", "triton", supports=reason_against)
def activation(x: Tensor, kind: str) -> Tensor:
    """A pointwise function. Differentiable."""
    return _Gated.apply(x.contiguous(), None, kind)


@backend.register("gated_activation", "triton", supports=reason_against)
def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """``act(gate) * up`` of ``gate_up[..., 2F]`` = [gate, up]. Differentiable."""
    gate, up = gate_up.contiguous().chunk(2, -1)
    return _Gated.apply(gate, up, kind)


class _Rope(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grad, *ctx.saved_tensors, True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    from pyparallel.kernels.elementwise.rope import rope as run

    positions = None
    if cos.dim() == 3:
        # A table for each sequence of the batch: one long table, and where each token's row is.
        b, s = cos.shape[:2]
        positions = torch.arange(b * s, device=x.device).view(b, s)
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        positions = positions.expand(x.shape[0], s).contiguous() if b == 1 else positions
    return run(
        x.contiguous(), cos.contiguous(), sin.contiguous(), positions=positions, inverse=inverse
    )


@backend.register("rope", "triton", supports=reason_against)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x[B, S, N, D]``; ``cos, sin [S, E]`` or ``[B, S, E]``. Differentiable in x."""
    return _Rope.apply(x, cos, sin)


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
        from pyparallel.kernels.attention.attention import attention as run

        q, k, v = (t.contiguous() for t in (q, k, v))
        ctx.options = {"causal": causal, "scale": scale, "window": window, "mask": mask}
        o, lse = run(q, k, v, **ctx.options)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        from pyparallel.kernels.attention.attention_backward import attention_backward

        q, k, v, o, lse = ctx.saved_tensors
        grads = attention_backward(grad.contiguous(), q, k, v, o, lse, **ctx.options)
        return *grads, None, None, None, None


def _decode(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    from pyparallel.kernels.attention.attention_decode import attention_decode

    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    o, _ = attention_decode(q.squeeze(1), k, v, lengths, scale=scale, window=window)
    return o.unsqueeze(1)


@backend.register("attention", "triton", supports=_attention_reason)
def attention(
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
