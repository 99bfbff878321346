"""Pointwise functions of the MLP; see :mod:`pyparallel.reference` for the equations."""

from __future__ import annotations

from torch import Tensor

from pyparallel import reference


def run_torch(x: Tensor, kind: str) -> Tensor:
    """``kind`` of :data:`pyparallel.reference.ACTIVATIONS`, in x's dtype. Differentiable."""
    return reference.ACTIVATIONS[kind](x)


run_reference = reference.activation
