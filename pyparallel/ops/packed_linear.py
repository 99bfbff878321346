"""A matmul with weights held in fewer bits, and a lookup in such a table.

    w[m, k] = scale[m] * data[m, k]     (int8), or the blocks' numbers, see pyparallel/cut/quantize.py
    y[..., M] = x[..., K] w^T + b

Activations keep their dtype. For inference: nothing here is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel import backend, reference
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.cut.quantize import PackedWeight


def run_torch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """With the weight unpacked for the length of the call."""
    if weight.scale is None:
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.dequantized(), wide).to(x.dtype)
    # A matrix in x's dtype, of numbers that it holds exactly.
    y = F.linear(x, weight.data.to(x.dtype)) * weight.scale
    return (y if bias is None else y + bias).to(x.dtype)


def run_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """With the numbers that the weight stands for, in fp32."""
    return reference.linear(x, weight.dequantized(), bias)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``y = x w^T + b`` on the backend that the table finds.

    Args:
        x: [..., K]. weight: [M, K]. bias: [M].

    Raises:
        ValueError: x wants a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"x: expected one that wants no gradient, since {weight.kind} weights are for inference; "
            "use torch.inference_mode(), or load without weights="
        )
    return backend.call("packed_linear", x, weight, bias)


def packed_embedding(ids: Tensor, weight: PackedWeight, *, start: int, group: Group) -> Tensor:
    """``y[..., H] = w[id]``, in the weight's dtype, of a table of which this rank holds the rows from
    ``start`` on.

    Communication: one all-reduce; the rank that holds a row adds it, and the others zeros.
    """
    N, H = weight.shape
    foreign = (ids < start) | (ids >= start + N)
    if N == 0:
        rows = torch.zeros(*ids.shape, H, dtype=weight.dtype, device=weight.data.device)
    else:
        local = (ids - start).masked_fill(foreign, 0)
        rows = weight.rows(local.flatten()).view(*ids.shape, H)
        rows = rows.masked_fill(foreign.unsqueeze(-1), 0).to(weight.dtype)
    return all_reduce_raw(rows, group) if group.size > 1 else rows
