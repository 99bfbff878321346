"""``act(gate) * up``, the gate of an MLP; see :mod:`pyparallel.reference` for the equations."""

from __future__ import annotations

from torch import Tensor

from pyparallel import reference


def run_torch(gate_up: Tensor, kind: str) -> Tensor:
    """``act(gate) * up`` of ``gate_up[..., 2F]`` = [gate, up]. Differentiable."""
    gate, up = gate_up.chunk(2, -1)
    return reference.GATES[kind](gate) * up


run_reference = reference.gated_activation
