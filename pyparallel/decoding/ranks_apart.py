"""Whether all ranks of a model are processes of one machine that share memory."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.models.decoder import Decoder

_shared: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def ranks_apart(model: Decoder) -> str | None:
    """Which ranks of the model do not share memory: alike on all, though each knows of its groups alone.

    The first call of a model whose context is cut is one of all its ranks.
    """
    groups = [model.group, getattr(model, "context", Group.single())]
    groups = [group for group in groups if group.size > 1]
    own = all(isinstance(group.communicator, SharedMemoryCommunicator) for group in groups)
    if len(groups) > 1:
        if model not in _shared:
            together = torch.tensor([own], dtype=torch.int32)
            for group in groups:
                together = all_reduce_raw(together, group, op="min")
            _shared[model] = bool(together.item())
        own = _shared[model]
    if own:
        return None
    names = ", ".join(group.communicator.name for group in groups)
    return f"expected ranks that share memory, got {names}"
