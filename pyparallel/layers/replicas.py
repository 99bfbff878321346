"""Torch's data-parallel wrappers, where a parameter is a shard.

``DistributedDataParallel`` gives all ranks of its process group the first one's weights, and the mean of
their gradients; FSDP leaves a part of each parameter on every rank, as if all had the same. Over ranks
of tp, whose shards are other parts of the dense weights, or of pp, which hold other layers, that
overwrites or mixes them without a word, and the loss stays plausible. The default is the whole world,
which plain ``DistributedDataParallel(model)`` and ``fully_shard(model)``, accelerate and transformers'
Trainer take. So they are refused over ranks that hold other parts of a sharded module, and go on working
over those that hold the same: dp x cp of the mesh. FSDP: :mod:`pyparallel.layers.fsdp_replicas`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from pyparallel.comm.group import Group
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import mesh_of

DDP_WAY = (
    "use pyparallel.data_parallel(model, mesh), or process_group=mesh.data_mesh.get_group() in a loop "
    "of your own (accelerate and Trainer take the whole world); in Trainer's place use "
    "pyparallel.Trainer"
)


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


def check_replicas(who: str, module: nn.Module, ranks: Iterable[int], way: str) -> None:
    """Raise where ``ranks`` hold other parts of a sharded module in ``module`` than this one.

    Args:
        who: asks.
        way: what to use instead.

    Raises:
        ValueError: it names the sharded module, those ranks and the way.
    """
    ranks = set(ranks)
    for name, part in module.named_modules():
        if not isinstance(part, ShardedModule):
            continue
        alike = replicas_of(part.group)
        if alike is not None and (others := sorted(ranks - alike)):
            raise ValueError(
                f"{who}: expected ranks that hold the same weights, got "
                f"{', '.join(map(str, others))}, which hold other parts of "
                f"{name or type(part).__name__} than rank {dist.get_rank()}; {way}"
            )


def ranks_of(
    group: dist.ProcessGroup | None, device_mesh: DeviceMesh | None = None
) -> Iterable[int]:
    """The ranks that torch's wrappers take for replicas: of the group, the mesh, or the whole world."""
    if group is None and device_mesh is not None:
        return device_mesh.mesh.flatten().tolist()
    return dist.get_process_group_ranks(dist.group.WORLD if group is None else group)


_wrap = DistributedDataParallel.__init__
_signature = inspect.signature(_wrap)


@wraps(_wrap)
def _checked_wrap(self: DistributedDataParallel, *args: Any, **options: Any) -> None:
    given = _signature.bind(self, *args, **options).arguments
    if dist.is_initialized():
        ranks = ranks_of(given.get("process_group"), given.get("device_mesh"))
        check_replicas("DistributedDataParallel", given["module"], ranks, DDP_WAY)
    _wrap(self, *args, **options)


def install() -> None:
    """Let torch's DDP be asked first; once, when the layers are imported."""
    if DistributedDataParallel.__init__ is not _checked_wrap:
        DistributedDataParallel.__init__ = _checked_wrap


install()
