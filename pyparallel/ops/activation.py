"""Pointwise functions of the MLP; see :mod:`pyparallel.reference` for the equations."""

from __future__ import annotations

from torch import Tensor

from pyparallel import backend, reference


@backend.register("activation", "torch")
def activation(x: Tensor, kind: str) -> Tensor:
    """``kind`` of :data:`pyparallel.reference.ACTIVATIONS`, in x's dtype. Differentiable."""
    return reference.ACTIVATIONS[kind](x)


@backend.register("gated_activation", "torch")
def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """``act(gate) * up`` of ``gate_up[..., 2F]`` = [gate, up]. Differentiable."""
    gate, up = gate_up.chunk(2, -1)
    return reference.GATES[kind](gate) * up


backend.register("activation", "reference")(reference.activation)
backend.register("gated_activation", "reference")(reference.gated_activation)
