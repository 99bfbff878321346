"""Fake kernels and gradients of the CUDA extension's torch ops; importing this loads the extension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyparallel.native.cuda import extension as cuda_extension

cuda_extension.load()
_ops = torch.ops.pyparallel


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"pyparallel::{name}")


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


@_fake("cuda_rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _rows(x)


@_fake("cuda_add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), _rows(x)


@_fake("cuda_rms_norm_backward")
def _(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dy), torch.empty_like(weight)


@_fake("cuda_layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _rows(x), _rows(x)


@_fake("cuda_layer_norm_backward")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight)


@_fake("cuda_bias_activation")
def _(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("cuda_bias_activation_backward")
def _(dy: Tensor, x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("cuda_gated_activation")
def _(
    gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: int
) -> Tensor:
    return gate.new_empty(gate.shape)


@_fake("cuda_gated_activation_backward")
def _(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: int,
) -> Tensor:
    return gate.new_empty(gate.shape[0], 2 * gate.shape[1])


@_fake("cuda_cross_entropy_stats")
def _(logits: Tensor, targets: Tensor, offset: int, ignored: int) -> Tensor:
    return logits.new_empty(logits.shape[0], 4, dtype=torch.float32)


@_fake("cuda_cross_entropy_gradient_")
def _(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    dloss: Tensor,
    offset: int,
    vocab: int,
    ignored: int,
    smoothing: float,
    z_loss: float,
    base: Tensor | None = None,
) -> None:
    return None


@_fake("cuda_rank_sum")
def _(parts: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    return None


def _rms_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _rms_backward(ctx: Any, dy: Tensor, drstd: Tensor | None) -> tuple[Tensor, Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _ops.cuda_rms_norm_backward(dy.contiguous(), x, weight, rstd)
    return dx, dweight, None


def _add_rms_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, h, rstd = output
    ctx.save_for_backward(h, inputs[2], rstd)


def _add_rms_backward(
    ctx: Any, dy: Tensor, dh: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = _ops.cuda_rms_norm_backward(dy.contiguous(), h, weight, rstd)
    # h goes on as the next residual: its gradient joins the norm's.
    total = dx if dh is None else dx + dh
    return total, total, dweight, None


def _layer_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output[1], output[2])


def _layer_backward(
    ctx: Any, dy: Tensor, dmean: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _ops.cuda_layer_norm_backward(dy.contiguous(), x, weight, mean, rstd)
    return dx, dweight, dbias if ctx.has_bias else None, None


def _bias_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.activation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, *([bias] if ctx.has_bias else []))


def _bias_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, *rest = ctx.saved_tensors
    bias = rest[0] if ctx.has_bias else None
    dx = _ops.cuda_bias_activation_backward(dy.contiguous(), x, bias, ctx.activation)
    return dx, dx.sum(0) if ctx.has_bias else None, None


def _gated_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, gate_bias, up_bias, ctx.activation = inputs
    ctx.biases = (gate_bias is not None, up_bias is not None)
    ctx.save_for_backward(gate, up, *(b for b in (gate_bias, up_bias) if b is not None))


def _gated_backward(
    ctx: Any, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
    gate, up, *rest = ctx.saved_tensors
    gate_bias = rest.pop(0) if ctx.biases[0] else None
    up_bias = rest.pop(0) if ctx.biases[1] else None
    both = _ops.cuda_gated_activation_backward(
        dy.contiguous(), gate, up, gate_bias, up_bias, ctx.activation
    )
    dgate, dup = both.chunk(2, dim=1)
    return (
        dgate,
        dup,
        dgate.sum(0) if ctx.biases[0] else None,
        dup.sum(0) if ctx.biases[1] else None,
        None,
    )


for _name, _backward, _setup in (
    ("cuda_rms_norm", _rms_backward, _rms_setup),
    ("cuda_add_rms_norm", _add_rms_backward, _add_rms_setup),
    ("cuda_layer_norm", _layer_backward, _layer_setup),
    ("cuda_bias_activation", _bias_backward, _bias_setup),
    ("cuda_gated_activation", _gated_backward, _gated_setup),
):
    torch.library.register_autograd(f"pyparallel::{_name}", _backward, setup_context=_setup)
