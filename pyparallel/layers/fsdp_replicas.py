"""FSDP over ranks that hold other parts of a sharded module is refused, as DDP is.

``fully_shard`` (FSDP2) and ``FullyShardedDataParallel`` ask
:func:`pyparallel.layers.replicas.check_replicas` before they change anything. Importing FSDP takes most
of a second, so it is met when somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.device_mesh import DeviceMesh

from pyparallel.layers.replicas import check_replicas, ranks_of

FSDP = "torch.distributed.fsdp"
WAY = (
    "use pyparallel.data_parallel(model, mesh, engine='fsdp'), or mesh=mesh.data_mesh (process_group="
    "mesh.data_mesh.get_group()) in a loop of your own"
)


def check_fsdp() -> None:
    """Let FSDP, which is imported, be asked first."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    _check_fully_shard(fully_shard)
    _check_wrapper(FullyShardedDataParallel)


def _check_fully_shard(public: Any) -> None:
    # Whoever has imported the function by its name holds a wrapper; so what that wraps is replaced.
    cell = public.__closure__[public.__code__.co_freevars.index("func")]
    theirs = cell.cell_contents

    @wraps(theirs)
    def checked(
        module: nn.Module | Sequence[nn.Module],
        *args: Any,
        mesh: DeviceMesh | None = None,
        **options: Any,
    ) -> Any:
        modules = [module] if isinstance(module, nn.Module) else list(module)
        # Parameters of torch's own SPMD meshes are DTensors, which ours are not.
        if dist.is_initialized() and options.get("dp_mesh_dims") is None:
            try:
                for one in modules:
                    check_replicas("fully_shard", one, ranks_of(None, mesh), WAY)
            except ValueError:
                _forget(modules, theirs.__name__, checked)
                raise
        return theirs(module, *args, mesh=mesh, **options)

    cell.cell_contents = checked


def _forget(modules: Iterable[nn.Module], name: str, key: Any) -> None:
    """Take back what torch's wrapper notes on modules before it asks."""
    for module in modules:
        vars(module).get(STATE_KEY, {}).pop(key, None)
        vars(module).get(REGISTRY_KEY, {}).pop(name, None)


def _check_wrapper(kind: type) -> None:
    theirs = kind.__init__
    signature = inspect.signature(theirs)

    @wraps(theirs)
    def checked(self: nn.Module, *args: Any, **options: Any) -> None:
        given = signature.bind(self, *args, **options).arguments
        if dist.is_initialized():
            groups = given.get("process_group")
            for group in groups if isinstance(groups, tuple) else (groups,):
                ranks = ranks_of(group, given.get("device_mesh"))
                check_replicas("FullyShardedDataParallel", given["module"], ranks, WAY)
        theirs(self, *args, **options)

    kind.__init__ = checked


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls :func:`check_fsdp` behind the first import of FSDP."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != FSDP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            check_fsdp()

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Once, when the layers are imported."""
    if FSDP in sys.modules:
        check_fsdp()
    else:
        sys.meta_path.insert(0, _WhenImported())


install()
