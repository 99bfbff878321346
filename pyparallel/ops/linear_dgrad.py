"""The gradient of a matmul's input: ``dx[..., K] = dy[..., M] w[M, K]``."""

from __future__ import annotations

from torch import Tensor

from pyparallel import reference


def run_torch(grad: Tensor, weight: Tensor) -> Tensor:
    """``dx[..., K] = dy[..., M] w[M, K]``."""
    return grad @ weight


def run_reference(grad: Tensor, weight: Tensor) -> Tensor:
    """As a matmul by ``w^T``, in fp32."""
    return reference.linear(grad, weight.t())
