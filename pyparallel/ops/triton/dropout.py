"""``dropout`` on Triton."""

from __future__ import annotations

from torch import Tensor

from pyparallel.kernels.elementwise.dropout import Dropout, dropout
from pyparallel.ops.triton import dtype_reason


def reason(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x)


def run(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> Tensor:
    """See :func:`pyparallel.ops.dropout.run_torch`. No autograd."""
    return dropout(x.contiguous(), dropout=Dropout(p, int(seed), x.shape[-2], rows, row_start))
