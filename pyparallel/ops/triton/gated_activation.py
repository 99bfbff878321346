"""``gated_activation`` on Triton, differentiable; ``activation`` shares its autograd."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.kernels.elementwise.gated_activation import (
    gated_activation,
    gated_activation_backward,
)
from pyparallel.ops.triton import dtype_reason


def reason(x: Tensor, kind: str) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x)


class Gated(Function):
    """``act(gate) * up``, or ``act(gate)`` alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_activation(gate, up, activation=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        return *gated_activation_backward(grad.contiguous(), gate, up, activation=ctx.kind), None


def run(gate_up: Tensor, kind: str) -> Tensor:
    """``act(gate) * up`` of ``gate_up[..., 2F]`` = [gate, up]. Differentiable."""
    gate, up = gate_up.contiguous().chunk(2, -1)
    return Gated.apply(gate, up, kind)
