"""all_reduce_residual_rms_norm of CPU ranks that share memory, for a few rows.

The partial sums are shown; one meeting; sum, residual and norm in one pass over each row. In inference
only: in training torch's own norm, whose gradient autograd knows, keeps its bits.
"""

from __future__ import annotations

from torch import Tensor

from pyparallel import _C
from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.native.cpu.weights import PRECISIONS
from pyparallel.ops.cpu._few_rows import reason_against


def reason(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group) -> str | None:
    """Why a call can't, or should not, run here."""
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        return "expected a residual of x's shape and a weight of its last axis"
    return reason_against(x.shape[:-1].numel(), x.shape[-1], group, x, residual, weight)


def run(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> tuple[Tensor, Tensor]:
    """(y, h): ``h = all_reduce(x) + residual``, ``y = h / sqrt(mean(h^2) + eps) * weight``; no
    autograd."""
    x, residual, wide = x.contiguous(), residual.contiguous(), weight.detach().float().contiguous()
    # Not empty_like: their rows are written one after another.
    h, y = x.new_empty(x.shape), x.new_empty(x.shape)
    record_collective("all_reduce", x.numel() * x.itemsize)
    _C.rank_sum_residual_rms_norm(
        group.communicator.free_engine(),
        x.data_ptr(),
        False,
        x.shape[:-1].numel(),
        x.shape[-1],
        PRECISIONS[x.dtype],
        residual.data_ptr(),
        wide.data_ptr(),
        eps,
        h.data_ptr(),
        y.data_ptr(),
    )
    return y, h
