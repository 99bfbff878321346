"""Groups from torch's own objects: a ``ProcessGroup``, or one dimension of a ``DeviceMesh``.

The one place where a process group gets an engine. Each has one :class:`Group` in a process, so its
ranks connect once, however often it is given.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.connect import connect
from pyparallel.comm.cuda.connect import connect_gpus
from pyparallel.comm.group import Group
from pyparallel.comm.heartbeat import close_heartbeats, note_connections
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.cut.shares import Shares

GroupLike: TypeAlias = "Group | dist.ProcessGroup | DeviceMesh"

_open: list[Communicator] = []
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()


def group_of(given: GroupLike, *, name: str = "group") -> Group:
    """``given`` itself where it is a :class:`Group`, else the one that it stands for.

    An axis of :func:`pyparallel.init_mesh`'s mesh is that mesh's own group, shares included. The first
    use of any other is a call of all its ranks: they connect.

    Args:
        given: a process group or a mesh of one dimension, which this rank is in.
        name: what the caller calls it, for messages.

    Raises:
        ValueError: anything else; more than one dimension; this rank is not in it.
        PeerError: its ranks could not reach one another.
    """
    if isinstance(given, Group):
        return given
    device_type = None
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            names = given.mesh_dim_names
            dims = tuple(range(given.ndim)) if names is None else names
            way = "a mesh with mesh_dim_names" if names is None else f"mesh[{names[-1]!r}]"
            raise ValueError(
                f"{name}: expected a DeviceMesh of one dimension, got {given.ndim}: {dims}; choose one "
                f"of them, such as {way}"
            )
        if given.get_coordinate() is None:
            ranks = given.mesh.flatten().tolist()
            raise _stranger(name, f"a DeviceMesh of the ranks {_short(ranks)}")
        device_type, given = given.device_type, given.get_group()
    # torch's mark for a group of others is a number.
    if isinstance(given, int) and given == dist.GroupMember.NON_GROUP_MEMBER:
        raise _stranger(name, "a process group of others")
    if not isinstance(given, dist.ProcessGroup):
        raise ValueError(
            f"{name}: expected a Group, a torch ProcessGroup or a DeviceMesh of one dimension, got "
            f"{type(given).__name__}; such as init_mesh(tp=2).tp, or Group.single() for one rank alone"
        )
    if given not in _groups:
        if device_type is None:
            device_type = "cuda" if "nccl" in dist.get_backend_config(given) else "cpu"
        # No axis of a mesh is called so: ranks of the same two groups may meet for each.
        remember(given, connected(given, f"process group {given.group_name}", device_type))
    return _groups[given]


def connected(
    process_group: dist.ProcessGroup, name: str, device_type: str, shares: Shares = ()
) -> Group:
    """A group of its own over ``process_group``, whose ranks connect: a call of all of them."""
    if process_group.size() == 1:
        return Group.over(LocalCommunicator(name))
    communicator = (
        connect(process_group, name) if device_type == "cpu" else connect_gpus(process_group, name)
    )
    communicator.process_group = process_group
    if not _open:
        atexit.unregister(_close_at_exit)
        # Before torch's own end of process, which was registered earlier and so comes later.
        atexit.register(_close_at_exit, os.getpid())
    _open.append(communicator)
    note_connections()
    return Group.over(communicator, shares)


def remember(process_group: dist.ProcessGroup, group: Group) -> None:
    """Have :func:`group_of` answer ``group`` for it from now on."""
    _groups[process_group] = group


def close_groups() -> None:
    """Give back every communicator of this process; a rank does this before it ends."""
    _groups.clear()
    try:
        while _open:
            _open.pop().close()
    finally:
        # Not before: what is left to be sent waits no longer where its host is lost.
        close_heartbeats()


def _close_at_exit(process: int) -> None:
    """Wait for what was sent, as :func:`close_groups` does, where a script ends without it.

    A script that fails goes at once, so that its peers are told; so does a fork of the process.
    """
    if os.getpid() != process or getattr(sys, "last_value", None) is not None:
        return
    try:
        close_groups()
    except RuntimeError as error:
        print(f"pyparallel: a message was not delivered: {error}", file=sys.stderr, flush=True)


def _stranger(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name}: expected one that this rank is in, got {what} on rank {dist.get_rank()}; call this "
        f"only on its ranks"
    )


def _short(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 16 else f"{str(ranks[:16])[:-1]}, ...]"
