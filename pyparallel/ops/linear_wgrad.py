"""The gradient of a matmul's weight: ``dw[M, K] = dy[..., M]^T x[..., K]``, over the leading axes."""

from __future__ import annotations

from torch import Tensor

from pyparallel import reference
from pyparallel.ops.linear import rows


def run_torch(grad: Tensor, x: Tensor) -> Tensor:
    """``dw[M, K] = dy[..., M]^T x[..., K]``, summed over the leading axes."""
    return rows(grad).t() @ rows(x)


def run_reference(grad: Tensor, x: Tensor) -> Tensor:
    """As a matmul of the transposed, in fp32."""
    return reference.linear(rows(grad).t(), rows(x).t())
