"""The CUDA extension's kernels in the op x backend table: for GPUs on which Triton is absent, or beside
it. The extension is loaded at the first call that can use it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.native.cuda import extension as cuda_extension

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Named alike in pyparallel.reference and in cuda_ops.
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
GATES = ACTIVATIONS[1:]


def _reason(x: Tensor, *others: Tensor | None) -> str | None:
    if not x.is_cuda:
        return f"the input is on {x.device.type}"
    if x.dtype not in FLOATS:
        return f"the kernels take no {x.dtype}"
    if any(t is not None and t.dtype != x.dtype for t in others):
        return "the dtypes of input and parameters differ"
    missing = cuda_extension.missing()
    return missing[0] if missing else None


def _norm_reason(x: Tensor, weight: Tensor | None, *rest: object, **_: object) -> str | None:
    if weight is None:
        return "the kernels need a weight"
    bias = rest[0] if rest and isinstance(rest[0], Tensor) else None
    return _reason(x, weight, bias)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


@backend.register("rms_norm", "cuda", supports=_norm_reason)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """See :mod:`pyparallel.ops.norm`. Differentiable."""
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops.rms_norm(_flat(x), weight, eps=eps).view(x.shape)


@backend.register("layer_norm", "cuda", supports=_norm_reason)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """See :mod:`pyparallel.ops.norm`. Differentiable."""
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops.layer_norm(_flat(x), weight, bias, eps=eps).view(x.shape)


def _activation_reason(x: Tensor, kind: str) -> str | None:
    return _reason(x) if kind in ACTIVATIONS else f"no kernel for {kind}"


@backend.register("activation", "cuda", supports=_activation_reason)
def activation(x: Tensor, kind: str) -> Tensor:
    """See :mod:`pyparallel.ops.activation`. Differentiable."""
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops.bias_activation(_flat(x), None, activation=kind).view(x.shape)


def _gate_reason(gate_up: Tensor, kind: str) -> str | None:
    return _reason(gate_up) if kind in GATES else f"no kernel for {kind}"


@backend.register("gated_activation", "cuda", supports=_gate_reason)
def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """See :mod:`pyparallel.ops.activation`. Differentiable."""
    from pyparallel.native.cuda import ops as cuda_ops

    gate, up = _flat(gate_up).chunk(2, -1)
    y = cuda_ops.gated_activation(gate, up, activation=kind)
    return y.view(*gate_up.shape[:-1], gate.shape[-1])


def _loss_reason(logits: Tensor, *_: object) -> str | None:
    return _reason(logits)


@backend.register("cross_entropy_statistics", "cuda", supports=_loss_reason)
def statistics(logits: Tensor, targets: Tensor, start: int, ignore_index: int) -> Tensor:
    """See :mod:`pyparallel.ops.cross_entropy_shard`."""
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops.cross_entropy_statistics(logits, targets, start=start, ignored=ignore_index)


@backend.register("cross_entropy_gradient_", "cuda", supports=_loss_reason)
def gradient_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    base: Tensor | None = None,
) -> Tensor:
    """See :mod:`pyparallel.ops.cross_entropy_shard`."""
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops.cross_entropy_gradient_(
        logits,
        targets,
        lse,
        grad,
        start=start,
        vocab=vocab_size,
        ignored=ignore_index,
        smoothing=label_smoothing,
        z_loss=z_loss,
        base=base,
    )
