"""linear_all_reduce and all_reduce_residual_rms_norm of CPU ranks that share memory, for a few rows.

    linear_all_reduce             the matmul writes this rank's partial sums where the peers read them;
                                  one meeting; the sum in rank order (+ bias)
    all_reduce_residual_rms_norm  the partial sums are shown; one meeting; sum, residual and norm in one
                                  pass over each row

Both store what the plain path stores, rounded where it rounds: same bits. They take over up to
MOST_ROWS rows; see docs/cpu.md for what was measured. The norm is fused in inference only: in training
torch's own, whose gradient autograd knows, keeps its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import _C, backend
from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.native.cpu.ops import MAX_THIN_ROWS, plain_reason
from pyparallel.native.cpu.weights import PRECISIONS, weight_argument

# Beyond, a call is bound by its matmul, and the plain all-reduce shares the sum over the ranks.
MOST_ROWS = 32


def _reason(rows: int, width: int, group: Group, *tensors: Tensor | None) -> str | None:
    """Why rows of ``width`` of ``tensors``, the first of which is summed, can't be summed here."""
    if not isinstance(group.communicator, SharedMemoryCommunicator):
        return f"the group '{group.communicator.name}' does not share memory"
    given = [t for t in tensors if t is not None]
    if any(t.dtype is not given[0].dtype for t in given):
        return "expected one dtype"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}"
    if rows * width * given[0].itemsize > group.communicator.slot_bytes:
        return f"{rows} rows of {width} do not fit {group.communicator.slot_bytes} bytes"
    return plain_reason(*given)


def linear_reason(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> str | None:
    """Why :func:`linear_all_reduce` can't, or should not, run a call."""
    # Asked of the last stride, which is alike on all ranks. A shard of one column or none is contiguous
    # however it lies, and its rank would make another call than the others.
    if weight.stride(-1) != 1:
        return "expected a contiguous weight"
    return _reason(x.shape[:-1].numel(), weight.shape[0], group, x, weight, bias)


@backend.register("linear_all_reduce", "cpu", supports=linear_reason)
def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``y = all_reduce(x w^T) + b``; no autograd."""
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    M, precision = x.shape[:-1].numel(), PRECISIONS[x.dtype]
    record_collective("all_reduce", y.numel() * y.itemsize)
    engine = group.communicator.free_engine()
    wide = x.detach().float().contiguous()
    # Rows of a slice lie apart.
    weight = weight.contiguous()
    in_place = x.dtype is torch.float32
    partial = None if in_place else torch.empty(M, N)
    held: list[Tensor] = []
    if y.numel():
        _C.cpu_linear(
            wide.data_ptr(),
            K,
            M,
            K,
            N,
            weight_argument("weight", weight, None, held),
            (),
            0,
            0,
            _C.own_slot(engine) if in_place else partial.data_ptr(),
            x.dtype is torch.bfloat16,
            M <= MAX_THIN_ROWS,
            torch.get_num_threads(),
        )
    _C.rank_sum(
        engine,
        0 if in_place else partial.data_ptr(),
        True,
        M,
        N,
        precision,
        0 if bias is None else bias.contiguous().data_ptr(),
        y.data_ptr(),
    )
    return y


def norm_reason(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> str | None:
    """Why :func:`all_reduce_residual_rms_norm` can't, or should not, run a call."""
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        return "expected a residual of x's shape and a weight of its last axis"
    return _reason(x.shape[:-1].numel(), x.shape[-1], group, x, residual, weight)


@backend.register("all_reduce_residual_rms_norm", "cpu", supports=norm_reason)
def all_reduce_residual_rms_norm(
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
