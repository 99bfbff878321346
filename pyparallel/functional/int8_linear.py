"""A matmul with weights held as int8 and one fp32 scale a row, and a lookup in such a table.

    w[m, k] = scale[m] * data[m, k]
    y[..., M] = x[..., K] w^T + b = scale * (x data^T) + b

Activations keep their dtype. For inference: nothing here is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel import backend, cpu_ops, reference
from pyparallel.collectives import all_reduce_raw
from pyparallel.group import Group
from pyparallel.quantize import dequantized


def _cpu_reason(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    if not data.is_cpu or not data.is_contiguous():
        return "expected a contiguous weight on the CPU"
    return cpu_ops.plain_reason(x, scale, bias)


@backend.register("int8_linear", "cpu", supports=_cpu_reason)
def _cpu(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return cpu_ops.linear(x, data, bias, scale=scale)


@backend.register("int8_linear", "torch")
def _torch(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # A matrix in x's dtype, of integers that it holds exactly, for the length of the call.
    y = F.linear(x, data.to(x.dtype)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


@backend.register("int8_linear", "reference")
def _reference(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear(x, dequantized(data, scale), bias)


def int8_linear(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x (scale data)^T + b`` on the backend that the table finds.

    Args:
        x: [..., K]. data: [M, K], int8. scale: [M], fp32. bias: [M].

    Raises:
        ValueError: x wants a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "x: expected one that wants no gradient, since int8 weights are for inference; "
            "use torch.inference_mode(), or load without weights='int8'"
        )
    return backend.call("int8_linear", x, data, scale, bias)


def int8_embedding(
    ids: Tensor, data: Tensor, scale: Tensor, *, start: int, group: Group, dtype: torch.dtype
) -> Tensor:
    """``y[..., H] = scale[id] data[id]`` of a table of which this rank holds the rows from ``start`` on.

    Communication: one all-reduce; the rank that holds a row adds it, and the others zeros.
    """
    foreign = (ids < start) | (ids >= start + data.shape[0])
    if data.shape[0] == 0:
        rows = torch.zeros(*ids.shape, data.shape[1], dtype=dtype, device=data.device)
    else:
        local = (ids - start).masked_fill(foreign, 0)
        rows = data[local].float() * scale[local].unsqueeze(-1)
        rows = rows.masked_fill(foreign.unsqueeze(-1), 0).to(dtype)
    return all_reduce_raw(rows, group) if group.size > 1 else rows
