"""When the rows that sum over GPUs of one machine, through each other's memory, take a call.

They have the bits of their ops' parts, and take messages up to the thresholds of
:mod:`pyparallel.native.cuda.tuning` only: beyond them NCCL is the faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.cuda.peers import PeerMemory
from pyparallel.comm.group import Group


def _peers_reason(x: Tensor, group: Group) -> str | None:
    """Why the peer kernels cannot run a call on this group, or None."""
    if not x.is_cuda:
        return f"the input is on {x.device.type}"
    if torch.compiler.is_compiling():
        return "not part of a compiled graph"
    if not isinstance(group.communicator, NcclCommunicator):
        return f"the group '{group.communicator.name}' does not run on our NCCL communicator"
    if group.communicator.peers is None:
        return f"the ranks of '{group.communicator.name}' do not address one another's memory"
    if not group.communicator.deterministic:
        return "sums in rank order are not asked for"
    return None


def linear_reason(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> str | None:
    """Why ``linear_all_reduce`` cannot, or should not, run here."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return "expected one dtype"
    num_bytes = x.shape[:-1].numel() * weight.shape[0] * x.itemsize
    return PeerMemory.reason_against_sum(x.dtype, num_bytes) or _peers_reason(x, group)


def norm_reason(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: Group
) -> str | None:
    """Why ``all_reduce_residual_rms_norm`` cannot, or should not, run here."""
    if weight is None:
        return "the kernel needs a weight"
    return PeerMemory.reason_against_norm(x, residual, weight) or _peers_reason(x, group)
