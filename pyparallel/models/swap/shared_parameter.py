"""Replicated parameters that work on shards: each rank sees a part of their gradient.

forward   w
backward  dw = all_reduce(dw of this rank's heads)
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from pyparallel.comm.collectives import copy_to_group
from pyparallel.comm.group import Group


class GradientSummed:
    """Mixed into a module's class: the gradients of its own parameters are summed over ``group``."""

    group: Group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: p for name, p in self._parameters.items() if p is not None}
        for name, parameter in own.items():
            self._parameters[name] = copy_to_group(parameter, self.group)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(own)


def always_sum_gradients(module: nn.Module, group: Group) -> None:
    """From now on, sum the gradients of all parameters in ``module`` over ``group``."""
    for part in module.modules():
        if any(p is not None for p in part._parameters.values()):
            part.__class__ = _summed(type(part))
            part.group = group


@cache
def _summed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"GradientSummed{kind.__name__}", (GradientSummed, kind), {})
