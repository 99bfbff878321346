"""The mesh: every rank's place along the four axes dp x pp x cp x tp.

tp varies fastest, so the ranks that talk most are neighbours; dp varies slowest. Built on torch's
``DeviceMesh``, so DDP, FSDP2, pipelining and DCP take ``mesh.device_mesh["dp"]`` as they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.group import Group
from pyparallel.comm.group_of import connected, remember
from pyparallel.comm.heartbeat import watch_hosts
from pyparallel.comm.interfaces import check_interfaces
from pyparallel.comm.peer_watch import naming_lost_peers
from pyparallel.comm.shared.engine import end_waits
from pyparallel.cut.shares import Shares, are_equal, check_shares
from pyparallel.limits import check_count, check_timeout, environment_number

AXES = ("dp", "pp", "cp", "tp")
# Of all machines together.
MAX_WORLD = 1 << 20

# Held, as their communicators are: a model asks for its group's mesh when nobody else holds it.
_meshes: list[Mesh] = []


@dataclass(frozen=True, eq=False)
class Mesh:
    """Named axes of ranks; each is the :class:`Group` of the ranks that differ along it only."""

    device_mesh: DeviceMesh
    world: Group
    dp: Group
    pp: Group
    cp: Group
    tp: Group

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis."""
        return {axis: getattr(self, axis).size for axis in AXES}

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """dp x cp as one axis, "dp_cp": the ranks that hold the same parameters and see other tokens.

        The first use is a call of all ranks of the world.
        """
        flat = self.device_mesh["dp", "cp"]._flatten("dp_cp")
        _set_pg_timeout(_timeout_of_world(), flat.get_group())
        return flat

    @cached_property
    def data(self) -> Group:
        """The group of :attr:`data_mesh`, which gradients are summed over.

        It talks through an engine of its own, so that gradients travel beside what the ranks of dp and
        cp say in backward. The first use is a call of all ranks of the world.
        """
        return connected(self.data_mesh.get_group(), "data", self.device_mesh.device_type)

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        shares = self.tp.shares
        return f"Mesh({sizes})" if are_equal(shares) else f"Mesh({sizes}, shares={shares})"


def init_mesh(
    device_mesh: DeviceMesh | None = None,
    *,
    dp: int | None = None,
    pp: int | None = None,
    cp: int | None = None,
    tp: int | None = None,
    shares: Sequence[int] | None = None,
    device_type: str | None = None,
    timeout_s: float | None = None,
) -> Mesh:
    """Lay the ranks of this job out as dp x pp x cp x tp.

    Called by every rank, inside :func:`pyparallel.launch`, under torchrun, or alone (one rank). Where
    torch.distributed is not initialised yet it is, from torchrun's environment.

    Args:
        device_mesh: torch's, instead of sizes: its dimensions are called dp, pp, cp and tp, some or
            all of them, and hold the world's ranks as they lie here, tp fastest. Its groups, such as
            ``device_mesh["tp"]``, are from then on this mesh's, wherever a group is taken.
        dp, pp, cp, tp: ranks along the axes, by default 1; their product is the number of ranks.
        shares: of every matrix, a whole number for each rank of tp: ``(2, 1, 1)`` where the first is
            twice as large or as fast as the others. By default equal. All ranks of the world give the
            same. What follows them: :mod:`pyparallel.cut.shares`, docs/shares.md.
        device_type: "cpu" or "cuda"; by default "cuda" where every local rank has a GPU.
        timeout_s: how long a collective of any axis may wait for a peer, in seconds; by default as
            long as torch.distributed's world, which is half an hour unless somebody set it.

    Raises:
        ValueError: a size below 1, a product that is not the world's size, a timeout not above 0;
            shares that are not whole numbers above 0, one for each rank of tp, or not those of another
            rank; a ``device_mesh`` of other names, places or devices.
    """
    if timeout_s is not None:
        timeout_s = check_timeout("timeout_s", timeout_s)
    asked = {"dp": dp, "pp": pp, "cp": cp, "tp": tp}
    if device_mesh is not None:
        asked, device_type = _sizes_of(device_mesh, asked, device_type), device_mesh.device_type
    sizes = {
        axis: check_count(axis, 1 if size is None else size, MAX_WORLD, unit=" rank")
        for axis, size in asked.items()
    }
    of_tp = check_shares("shares", (1,) * sizes["tp"] if shares is None else shares, sizes["tp"])
    with naming_lost_peers("init_mesh"):
        mesh = _init_mesh(sizes, of_tp, device_type, timeout_s)
    if device_mesh is not None:
        for axis in device_mesh.mesh_dim_names or ():
            remember(device_mesh.get_group(axis), getattr(mesh, axis))
    return mesh


def _sizes_of(
    mesh: DeviceMesh, asked: dict[str, int | None], device_type: str | None
) -> dict[str, int | None]:
    """The axes' sizes, where the mesh lays the ranks out as we do; else why not."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(
            f"device_mesh: expected torch's DeviceMesh, got {type(mesh).__name__}; sizes are given by "
            f"name, as in init_mesh(tp=2)"
        )
    given = [axis for axis, size in asked.items() if size is not None]
    if given:
        raise ValueError(
            f"{given[0]}: expected no sizes beside device_mesh, which has them, got {given[0]}="
            f"{asked[given[0]]}"
        )
    if device_type not in (None, mesh.device_type):
        raise ValueError(
            f"device_type: expected {mesh.device_type!r}, as device_mesh has it, got {device_type!r}"
        )
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(AXES):
        raise ValueError(
            f"device_mesh: expected dimensions called dp, pp, cp or tp, got {names or 'none'}; name "
            f"them so (mesh_dim_names), or give one of them as group= where it is used"
        )
    world = dist.get_world_size()
    order = [names.index(axis) for axis in AXES if axis in names]
    places = mesh.mesh.permute(order).flatten().tolist()
    if places != list(range(world)):
        inward = " x ".join(axis for axis in AXES if axis in names)
        raise ValueError(
            f"device_mesh: expected the world's ranks 0 to {world - 1} in the order of {inward}, the "
            f"last fastest, got {str(places)[:60]}; make it by init_device_mesh with its dimensions so"
        )
    return {axis: mesh.size(names.index(axis)) if axis in names else 1 for axis in AXES}


def _init_mesh(
    sizes: dict[str, int], shares: Shares, device_type: str | None, timeout_s: float | None
) -> Mesh:
    init_distributed(timeout_s)
    world_size = dist.get_world_size()
    product = math.prod(sizes.values())
    if product != world_size:
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh: {asked} = {product} ranks, but the world has {world_size}; "
            f"start {product} ranks or choose sizes whose product is {world_size}"
        )
    if sizes["tp"] > 1:
        _check_alike(shares)
    if device_type is None:
        device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    device_mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=AXES)
    for axis in AXES:
        # A new process group waits as long as torch's default, whatever the world was told.
        _set_pg_timeout(_timeout_of_world(), device_mesh.get_group(axis))
    process_groups = {axis: device_mesh.get_group(axis) for axis in AXES}
    groups = {
        axis: connected(process_group, axis, device_type, shares if axis == "tp" else ())
        for axis, process_group in process_groups.items()
    }
    world = world_group()
    mesh = Mesh(device_mesh, connected(world, "world", device_type), **groups)
    remember(world, mesh.world)
    # An axis of all ranks may be torch's world itself; layers want to know of the axis.
    for axis, process_group in process_groups.items():
        remember(process_group, groups[axis])
    watch_hosts(world, end_waits)
    _meshes.append(mesh)
    return mesh


def mesh_of(group: Group) -> Mesh | None:
    """The mesh of which ``group`` is the tp axis, if it is one's."""
    return next((mesh for mesh in _meshes if mesh.tp is group), None)


def _check_alike(shares: Shares) -> None:
    """Ranks that cut by other shares would read other numbers in each other's messages."""
    told = [tuple(other) for other in gather_objects(world_group(), list(shares))]
    others = [rank for rank, other in enumerate(told) if other != told[0]]
    if others:
        raise ValueError(
            f"shares: expected the same on all ranks, got {told[0]} on rank 0 and {told[others[0]]} on "
            f"rank {others[0]}; give every rank the first one's"
        )


def world_group() -> dist.ProcessGroup:
    """torch's group of all ranks.

    Raises:
        ValueError: torch.distributed is not initialised.
    """
    world = dist.group.WORLD
    if world is None:
        raise ValueError("torch.distributed: expected to be initialised; call init_mesh first")
    return world


def _timeout_of_world() -> timedelta:
    world = world_group()
    return world._get_backend(world._device_types[0]).options._timeout


def init_distributed(timeout_s: float | None) -> None:
    """torch's world, from torchrun's variables or of this process alone; else how long it waits."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    if dist.is_initialized():
        if timeout is not None:
            _set_pg_timeout(timeout, world_group())
        return
    if "RANK" not in os.environ:
        # A single process has no peers: an in-memory store serves it.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return
    world = environment_number("WORLD_SIZE", None, least=1, most=MAX_WORLD)
    rank = environment_number("RANK", None, least=0, most=world - 1)
    local_world = environment_number("LOCAL_WORLD_SIZE", 1, least=1, most=world)
    backend = "gloo"
    if torch.cuda.device_count() >= local_world:
        local = environment_number("LOCAL_RANK", None, least=0, most=local_world - 1)
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    if local_world == world:
        dist.init_process_group(backend, timeout=timeout)
        return
    # As torch does it by itself, with a look at the hosts before they connect.
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout or default_pg_timeout))
    store.set_timeout(timeout or default_pg_timeout)
    check_interfaces(store, rank, world)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
