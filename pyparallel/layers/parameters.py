"""What every sharded module shares: parameters that know which part of the dense tensor they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyparallel.group import Group
from pyparallel.shard import Sharding


class ShardedModule(nn.Module):
    """A module whose parameters are shards.

    Attributes:
        group: the ranks the parameters are cut over.
        shardings: for each of the module's own parameters, which ranges of the dense one it holds.
        dense_shapes: the dense parameters' shapes.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self.shardings: dict[str, Sharding] = {}
        self.dense_shapes: dict[str, tuple[int, ...]] = {}

    def add_shard(
        self,
        name: str,
        shape: tuple[int, ...],
        sharding: Sharding,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register an uninitialised parameter: this rank's part of a dense one of ``shape``."""
        local = sharding.local_shape(shape, self.group.rank)
        self.register_parameter(name, nn.Parameter(torch.empty(local, device=device, dtype=dtype)))
        self.shardings[name] = sharding
        self.dense_shapes[name] = shape

    def split_dense(self, name: str, dense: Tensor) -> Tensor:
        """This rank's part of the dense parameter ``name``."""
        if tuple(dense.shape) != self.dense_shapes[name]:
            raise ValueError(
                f"{name}: expected a dense tensor of shape {self.dense_shapes[name]}, "
                f"got {tuple(dense.shape)}"
            )
        return self.shardings[name].split(dense, self.group.rank)

    def load_dense(self, dense: nn.Module | Mapping[str, Tensor | None]) -> ShardedModule:
        """Take this rank's parts of a dense module's (or mapping's) parameters; returns self.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        for name in self.shardings:
            value = dense.get(name) if isinstance(dense, Mapping) else getattr(dense, name, None)
            if value is None:
                raise ValueError(
                    f"{name}: expected a dense tensor of shape {self.dense_shapes[name]}, got none; "
                    f"make this module without {name}, or give one"
                )
            trained = value.requires_grad if isinstance(value, nn.Parameter) else True
            part = self.split_dense(name, value.detach())
            setattr(self, name, nn.Parameter(part, requires_grad=trained))
        return self


def init_linear(module: ShardedModule, fan_in: int) -> None:
    """``nn.Linear``'s initialisation, drawn dense and cut: independent of the number of ranks."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    for name in ("weight", "bias"):
        parameter = getattr(module, name)
        if parameter is None or parameter.is_meta:
            continue
        dense = torch.empty(
            module.dense_shapes[name], device=parameter.device, dtype=parameter.dtype
        )
        with torch.no_grad():
            parameter.copy_(module.split_dense(name, dense.uniform_(-bound, bound)))
