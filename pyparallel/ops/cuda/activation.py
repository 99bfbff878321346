"""``activation`` by the CUDA extension (csrc/cuda: bias_activation)."""

from __future__ import annotations

from torch import Tensor

from pyparallel import reference
from pyparallel.native.cuda import ops
from pyparallel.ops.cuda import dtype_reason, flat


def reason(x: Tensor, kind: str) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x) if kind in reference.ACTIVATIONS else f"no kernel for {kind}"


def run(x: Tensor, kind: str) -> Tensor:
    """See :mod:`pyparallel.ops.activation`. Differentiable."""
    return ops.bias_activation(flat(x), None, activation=kind).view(x.shape)
