"""The kernels of the CUDA extension as functions that check their arguments.

Importing this module loads the extension (RuntimeError where it is not built). Shapes and equations are
in the header of each kernel under csrc/cuda; tensors are [M, N] here, and the callers flatten. All raise
ValueError where shapes, strides, dtypes or devices do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda import fakes as cuda_fakes  # noqa: F401  (registers what the ops need)
from pyparallel.native.cuda.checks import (
    check_devices,
    check_dtype,
    check_dtypes,
    check_matrix,
    check_vector,
)

_ops = torch.ops.pyparallel

# Their numbers, by the names of csrc/core/activation.h.
ACTIVATIONS: dict[str, int] = cuda_extension.load().ACTIVATIONS


def activation_code(name: str) -> int:
    """The number of an activation; ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y [M, H] = x / rms(x) * weight."""
    check_vector("weight", weight, check_matrix("x", x, contiguous=True)[1])
    check_dtypes(x=x, weight=weight)
    check_devices(x=x, weight=weight)
    return _ops.cuda_rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, h): h = x + residual, y = h / rms(h) * weight."""
    shape = check_matrix("x", x, contiguous=True)
    check_matrix("residual", residual, shape, contiguous=True)
    check_vector("weight", weight, shape[1])
    check_dtypes(x=x, residual=residual, weight=weight)
    check_devices(x=x, residual=residual, weight=weight)
    y, h, _ = _ops.cuda_add_rms_norm(x, residual, weight, eps)
    return y, h


def rms_norm_backward(
    dy: Tensor, h: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """dx and dweight of y = h / rms(h) * weight, for a caller that has no statistics left."""
    shape = check_matrix("h", h, contiguous=True)
    check_matrix("dy", dy, shape, contiguous=True)
    check_vector("weight", weight, shape[1])
    check_dtypes(dy=dy, h=h, weight=weight)
    check_devices(dy=dy, h=h, weight=weight)
    rstd = (h.float().square().mean(1) + eps).rsqrt()
    return _ops.cuda_rms_norm_backward(dy, h, weight, rstd)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    """y [M, H] = (x - mean) / std * weight + bias."""
    _, hidden = check_matrix("x", x, contiguous=True)
    check_vector("weight", weight, hidden)
    check_vector("bias", bias, hidden)
    check_dtypes(x=x, weight=weight, bias=bias)
    check_devices(x=x, weight=weight, bias=bias)
    return _ops.cuda_layer_norm(x, weight, bias, eps)[0]


def bias_activation(x: Tensor, bias: Tensor | None, *, activation: str) -> Tensor:
    """y [M, N] = act(x + bias)."""
    code = activation_code(activation)
    check_vector("bias", bias, check_matrix("x", x)[1])
    check_dtypes(x=x, bias=bias)
    check_devices(x=x, bias=bias)
    return _ops.cuda_bias_activation(x, bias, code)


def gated_activation(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """y [M, N] = act(gate + gate_bias) * (up + up_bias); gate and up may be halves of one matrix."""
    code, shape = activation_code(activation), check_matrix("gate", gate)
    check_matrix("up", up, shape)
    if gate.stride(0) != up.stride(0):
        raise ValueError(
            f"up: expected the row stride of gate, {gate.stride(0)}, got {up.stride(0)}; make both "
            f"contiguous, or halves of one matrix"
        )
    check_vector("gate_bias", gate_bias, shape[1])
    check_vector("up_bias", up_bias, shape[1])
    check_dtypes(gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias)
    check_devices(gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias)
    return _ops.cuda_gated_activation(gate, up, gate_bias, up_bias, code)


def rank_sum(
    parts: Tensor, out: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """out [M, N] = parts[0] + ... + parts[R-1] + bias + residual: in rank order, fp32, rounded once."""
    if parts.dim() != 3:
        raise ValueError(
            f"parts: expected [R, M, N], got {list(parts.shape)}; stack the ranks' parts"
        )
    _, rows, columns = parts.shape
    if (columns > 1 and parts.stride(2) != 1) or (rows > 1 and parts.stride(1) != columns):
        raise ValueError(
            f"parts: expected a contiguous [M, N] of each rank, got strides {list(parts.stride())}; "
            f"call .contiguous()"
        )
    check_matrix("out", out, (rows, columns), contiguous=True)
    check_vector("bias", bias, columns)
    if residual is not None:
        check_matrix("residual", residual, (rows, columns), contiguous=True)
    check_dtypes(parts=parts, out=out, bias=bias, residual=residual)
    check_devices(parts=parts, out=out, bias=bias, residual=residual)
    _ops.cuda_rank_sum(parts, bias, residual, out)


def reduce_on_gpu(parts: Tensor, out: Tensor) -> None:
    """parts [R, m, N] summed into out [m, N], where there is anything to sum."""
    if out.numel() > 0:
        rank_sum(parts, out)


def cross_entropy_statistics(
    logits: Tensor, targets: Tensor, *, start: int, ignored: int
) -> Tensor:
    """[M, 4]: max, sum of exponentials, the target's logit, sum of the logits less their max."""
    _check_loss(logits, targets)
    return _ops.cuda_cross_entropy_stats(logits, targets, start, ignored)


def cross_entropy_gradient_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    dloss: Tensor,
    *,
    start: int,
    vocab: int,
    ignored: int,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    base: Tensor | None = None,
) -> Tensor:
    """The logits [M, V_r], overwritten with their gradient; ``lse`` is that of ``logits - base``."""
    _check_loss(logits, targets)
    for name, tensor in (("lse", lse), ("dloss", dloss), ("base", base)):
        if tensor is not None:
            check_vector(name, tensor.contiguous(), logits.shape[0])
            check_dtype(name, tensor, torch.float32)
    check_devices(logits=logits, lse=lse, dloss=dloss, base=base)
    numbers = (start, vocab, ignored, smoothing, z_loss)
    _ops.cuda_cross_entropy_gradient_(logits, targets, lse, dloss.contiguous(), *numbers, base)
    return logits


def _check_loss(logits: Tensor, targets: Tensor) -> None:
    check_vector("targets", targets, check_matrix("logits", logits)[0])
    check_dtypes(logits=logits)
    check_dtype("targets", targets, torch.int64)
    check_devices(logits=logits, targets=targets)
