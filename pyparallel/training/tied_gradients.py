"""The gradient of a weight that the first and the last stage of a pipeline both hold.

    first   dw = dw_first + dw_last        sends it
    last    dw = the first's

Each stage sees one use of a tied embedding: the lookup, and the head. Two messages of [V_r, H].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyparallel.comm.group import Group


@torch.no_grad()
def sum_tied_gradients(stages: Sequence[nn.Module], group: Group, *, first: int, last: int) -> None:
    """Make the gradient of a shared weight the sum of its stages', on both; a call of all ranks.

    Args:
        stages: this rank's.
        group: the pipeline's ranks. first, last: those with the first and the last stage.
    """
    owner = next((s.tied_weight for s in stages if s.stage.is_first), None)
    copy = next((s.tied_weight for s in stages if s.stage.is_last), None)
    if owner is copy:
        # Neither is here, or one parameter has both uses.
        return
    if owner is not None and copy is not None:
        total = _gradient(owner) + _gradient(copy)
        _gradient(owner).copy_(total)
        _gradient(copy).copy_(total)
        return
    own = _gradient(owner if owner is not None else copy).contiguous()
    if owner is not None:
        other = torch.empty_like(own)
        group.communicator.recv(other, last)
        # In the order of the stages, rounded once.
        own.copy_((own.float() + other.float()) if own.itemsize < 4 else own + other)
        group.communicator.send(own, last)
    else:
        group.communicator.send(own, first)
        group.communicator.recv(own, first)
    held = _gradient(owner if owner is not None else copy)
    if held.data_ptr() != own.data_ptr():
        held.copy_(own)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient's memory on this rank; zeros where backward gave none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad
    # FSDP's is a DTensor, cut alike on both stages.
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
