"""Reductions over the parts of all ranks, in rank order, for engines that only move bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel import _C
from pyparallel.comm.shared.host_tensors import REDUCIBLE_CODES

_FOLDS = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of ``dtype`` are reduced: fp32 where that is wider, else the same."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def rank_ordered_reduce(parts: Sequence[Tensor], op: str, output: Tensor) -> None:
    """``output = op(parts[0], parts[1], ...)``, in that order, in fp32, rounded once.

    Where one of the parts is a total of narrower ones, it is of the accumulator's type.
    """
    wide = accumulator(output.dtype)
    if _is_plain(parts, op, output):
        addresses = [part.data_ptr() for part in parts]
        _C.sum_parts(output.data_ptr(), addresses, output.numel(), REDUCIBLE_CODES[output.dtype])
        return
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        _FOLDS[op](total, part.to(wide), out=total)
    output.copy_(total.view(output.shape))


def _is_plain(parts: Sequence[Tensor], op: str, output: Tensor) -> bool:
    """Whether one pass of the CPU extension does it: a sum in the type that all are of."""
    return (
        op == "sum"
        and output.is_cpu
        and output.dtype in REDUCIBLE_CODES
        and output.dtype == accumulator(output.dtype)
        and all(x.dtype == output.dtype and x.is_contiguous() for x in (*parts, output))
    )
