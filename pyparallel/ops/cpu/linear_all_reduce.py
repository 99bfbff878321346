"""linear_all_reduce of CPU ranks that share memory, for a few rows.

The matmul writes this rank's partial sums where the peers read them; one meeting; the sum in rank order
(+ bias).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import _C
from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.native.cpu.ops import MAX_THIN_ROWS
from pyparallel.native.cpu.weights import PRECISIONS, weight_argument
from pyparallel.ops.cpu._few_rows import reason_against


def reason(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> str | None:
    """Why a call can't, or should not, run here."""
    # Asked of the last stride, which is alike on all ranks. A shard of one column or none is contiguous
    # however it lies, and its rank would make another call than the others.
    if weight.stride(-1) != 1:
        return "expected a contiguous weight"
    return reason_against(x.shape[:-1].numel(), weight.shape[0], group, x, weight, bias)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
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
