"""``linear_wgrad`` on Triton."""

from __future__ import annotations

from torch import Tensor

from pyparallel.kernels.matmul.matmul_descriptor import matmul_on_best_path
from pyparallel.ops.triton import flat
from pyparallel.ops.triton.linear import reason  # noqa: F401


def run(grad: Tensor, x: Tensor) -> Tensor:
    """``dw[M, K] = dy[..., M]^T x[..., K]``."""
    return matmul_on_best_path(flat(grad).t(), flat(x).t())
