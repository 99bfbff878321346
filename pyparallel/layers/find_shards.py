"""Which of the tensors that torch's own functions are given are shards, and of what.

Such a function sees tensors and no modules. A shard, a detached alias of it and its gradient are known
by the memory they lie in; a copy is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.comm.group import Group
from pyparallel.cut.shard import REPLICATED, Sharding
from pyparallel.layers.living import living_modules, living_optimizers
from pyparallel.mesh import mesh_of

Memory = tuple[torch.device, int, torch.Size]


@dataclass(frozen=True)
class Shard:
    """What a tensor is a part of.

    Attributes:
        label: the class of the module that has the parameter, and its name in there.
        group: the ranks the dense tensor is cut over.
        sharding: which part of it each of them has.
        stages: of the pipeline that the module is in, 1 where it is in none.
    """

    label: str
    group: Group
    sharding: Sharding
    stages: int

    @property
    def is_cut(self) -> bool:
        """Whether it is less than the dense tensor."""
        return self.group.size > 1 and self.sharding.dim is not None


def find_shards(tensors: Sequence[Any], *, of_optimizers: bool = False) -> list[Shard | None]:
    """For each tensor what it is a part of: a parameter of a sharded module, or the gradient of one.

    Modules on one rank, outside of a pipeline, have nothing to be found.

    Args:
        of_optimizers: what they keep of a parameter is such a part too.
    """
    known: dict[Memory | None, Shard] = {}
    owners: dict[int, Shard] = {}
    for module in living_modules():
        mesh = mesh_of(module.group)
        stages = 1 if mesh is None else mesh.pp.size
        if module.group.size == 1 and stages == 1:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            label = f"{type(module).__name__}.{name}"
            shard = Shard(label, module.group, module.shardings.get(name, REPLICATED), stages)
            owners[id(parameter)] = shard
            known[_memory(parameter)] = known[_memory(parameter.grad)] = shard
    for optimizer in living_optimizers() if of_optimizers and owners else ():
        for parameter, state in optimizer.state.items():
            if id(parameter) in owners:
                alike = [value for value in state.values() if _shape(value) == parameter.shape]
                known |= {_memory(value): owners[id(parameter)] for value in alike}
    known.pop(None, None)
    return [known.get(_memory(tensor)) for tensor in tensors] if known else [None] * len(tensors)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; without one, its module need not be imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _memory(tensor: Any) -> Memory | None:
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    if type(local) not in (Tensor, nn.Parameter):
        return None
    if local.is_meta or local.layout is not torch.strided:
        return None
    return local.device, local.data_ptr(), local.shape
