"""Reductions over the parts of all ranks, in rank order, for engines that only move bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_ordered_reduce(parts: Sequence[Tensor], op: str, output: Tensor) -> None:
    """``output = op(parts[0], parts[1], ...)``, in that order, in fp32, rounded once."""
    wide = torch.float32 if output.is_floating_point() and output.itemsize < 4 else output.dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        if op == "sum":
            total += part
        elif op == "max":
            torch.maximum(total, part.to(wide), out=total)
        else:
            torch.minimum(total, part.to(wide), out=total)
    output.copy_(total.view(output.shape))
