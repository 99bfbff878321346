"""linear_all_reduce of GPUs of one machine: cuBLASLt's matmul, then one peer kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.comm.collectives import record_collective
from pyparallel.comm.group import Group
from pyparallel.ops.cuda._peers import linear_reason as reason  # noqa: F401
from pyparallel.ops.linear import rows


def run(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``y[..., M] = all_reduce(x w^T) + b``. No autograd."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    record_collective("all_reduce", y.numel() * y.itemsize)
    if y.numel() == 0:
        return y
    torch.mm(rows(x), weight.t(), out=rows(y))
    group.communicator.call(group.communicator.peers.all_reduce, y, "sum")
    return y if bias is None else y.add_(bias)
