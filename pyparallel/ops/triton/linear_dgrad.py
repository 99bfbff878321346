"""``linear_dgrad`` on Triton."""

from __future__ import annotations

from torch import Tensor

from pyparallel.kernels.matmul.matmul_descriptor import matmul_on_best_path
from pyparallel.ops.triton import flat
from pyparallel.ops.triton.linear import reason  # noqa: F401


def run(grad: Tensor, weight: Tensor) -> Tensor:
    """``dx[..., K] = dy[..., M] w[M, K]``."""
    return matmul_on_best_path(flat(grad), weight.t()).view(*grad.shape[:-1], weight.shape[1])
