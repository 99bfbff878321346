"""``gated_activation`` by the CUDA extension (csrc/cuda: bias_activation)."""

from __future__ import annotations

from torch import Tensor

from pyparallel import reference
from pyparallel.native.cuda import ops
from pyparallel.ops.cuda import dtype_reason, flat


def reason(gate_up: Tensor, kind: str) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(gate_up) if kind in reference.GATES else f"no kernel for {kind}"


def run(gate_up: Tensor, kind: str) -> Tensor:
    """See :mod:`pyparallel.ops.gated_activation`. Differentiable."""
    gate, up = flat(gate_up).chunk(2, -1)
    y = ops.gated_activation(gate, up, activation=kind)
    return y.view(*gate_up.shape[:-1], gate.shape[-1])
