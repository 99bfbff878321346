"""LayerNorm and RMSNorm over the last axis; see :mod:`pyparallel.reference` for the equations."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pyparallel import backend, reference


@backend.register("layer_norm", "torch")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``. Differentiable."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@backend.register("rms_norm", "torch")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight``. Differentiable."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


backend.register("layer_norm", "reference")(reference.layer_norm)
backend.register("rms_norm", "reference")(reference.rms_norm)
