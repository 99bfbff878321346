"""Torch's ``DistributedDataParallel``, where a parameter is a shard.

It gives all ranks of its process group the first one's weights, and the mean of their gradients. Over
ranks of tp, whose shards are other parts of the dense weights, or of pp, which hold other layers, that
overwrites one part by another without a word, and the loss stays plausible. The default is the whole
world, which plain ``DistributedDataParallel(model)``, accelerate and transformers' Trainer take. So it
is refused over ranks that hold other parts of a sharded module, and goes on working over those that hold
the same: dp x cp of the mesh.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pyparallel.comm.group import Group
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import mesh_of


def replicas_of(group: Group) -> set[int] | None:
    """The ranks that hold what this one does of a module cut over ``group``; None if the group does not
    say which ranks of the world are its own."""
    mesh = mesh_of(group)
    if mesh is not None:
        # dp, pp, cp, tp.
        return set(mesh.device_mesh.mesh[:, mesh.pp.rank, :, mesh.tp.rank].flatten().tolist())
    if group.communicator.process_group is None:
        return None
    peers = set(dist.get_process_group_ranks(group.communicator.process_group))
    return set(range(dist.get_world_size())) - peers | {dist.get_rank()}


def check_replicas(name: str, group: Group, ranks: Iterable[int]) -> None:
    """Raise where ``ranks`` hold other parts of the module ``name`` than this one.

    Args:
        group: that the module is cut over.

    Raises:
        ValueError: it names the module, those ranks and what to use.
    """
    alike = replicas_of(group)
    if alike is not None and (others := sorted(set(ranks) - alike)):
        raise ValueError(
            f"DistributedDataParallel: expected ranks that hold the same weights, got "
            f"{', '.join(map(str, others))}, which hold other parts of {name} than rank "
            f"{dist.get_rank()}; use pyparallel.data_parallel(model, mesh), or "
            f"process_group=mesh.data_mesh.get_group() in a loop of your own (accelerate and Trainer "
            f"take the whole world)"
        )


_wrap = DistributedDataParallel.__init__
_signature = inspect.signature(_wrap)


@wraps(_wrap)
def _checked_wrap(self: DistributedDataParallel, *args: Any, **options: Any) -> None:
    given = _signature.bind(self, *args, **options).arguments
    group, device_mesh = given.get("process_group"), given.get("device_mesh")
    if group is None and device_mesh is not None and device_mesh.ndim == 1:
        group = device_mesh.get_group()
    if dist.is_initialized():
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        for name, module in given["module"].named_modules():
            if isinstance(module, ShardedModule):
                check_replicas(name or type(module).__name__, module.group, ranks)
    _wrap(self, *args, **options)


def install() -> None:
    """Let torch's DDP be asked first; once, when the layers are imported."""
    if DistributedDataParallel.__init__ is not _checked_wrap:
        DistributedDataParallel.__init__ = _checked_wrap


install()
