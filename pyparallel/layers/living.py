"""The sharded modules, and the optimizers, that are in use in this process.

Torch's own functions that meet shards are told of neither.
"""

from __future__ import annotations

import weakref

from torch import nn
from torch.optim import Optimizer

# Copies are here too.
_living: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def add(module: nn.Module) -> None:
    """Remember a module for as long as somebody else does."""
    _living.add(module)


def living_modules() -> list[nn.Module]:
    """All :class:`~pyparallel.layers.parameters.ShardedModule` that are in use."""
    return [module for module in list(_living) if "_parameters" in vars(module)]


def add_optimizer(optimizer: Optimizer) -> None:
    """Remember an optimizer for as long as somebody else does."""
    _optimizers.add(optimizer)


def living_optimizers() -> list[Optimizer]:
    """All optimizers that have taken a step."""
    return list(_optimizers)
