"""Which ranks write into one folder: all of them where hosts share it, else those of each host."""

from __future__ import annotations

import socket
from pathlib import Path

import torch.distributed as dist

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.comm.rendezvous import machines_of
from pyparallel.mesh import world_group


def first_of_folder(*, per_host: bool) -> int:
    """The rank that makes the folder this rank writes into; a call of all ranks."""
    if not per_host:
        return 0
    rank = dist.get_rank()
    return next(ranks[0] for ranks in machines_of(world_group()) if rank in ranks)


def check_seen(folder: Path, working: Path, *, first: int, of_all: Path) -> None:
    """Whether this rank sees the folder it writes into, and another host's not.

    Args:
        folder: of the checkpoint, for messages.
        working: what rank ``first`` has made to write into.
        of_all: what rank 0 has made.

    Raises:
        CheckpointError: the hosts don't share the folder, or do where each was to have its own.
    """
    if not working.is_dir():
        raise CheckpointError(
            f"{folder}: rank {dist.get_rank()} on host {socket.gethostname()} does not see what rank "
            f"{first} writes there; give a folder that all hosts share, or save(per_host=True) and "
            f"`pyparallel merge` what each host has"
        )
    if working != of_all and of_all.is_dir():
        raise CheckpointError(
            f"{folder}: rank {dist.get_rank()} on host {socket.gethostname()} sees what rank 0 writes "
            f"there; save without per_host, since the hosts share the folder"
        )


def on_this_host() -> str:
    """Where this rank looks, for messages; "" on one machine alone. A call of all ranks."""
    if len(machines_of(world_group())) == 1:
        return ""
    return f" on host {socket.gethostname()} of rank {dist.get_rank()}"
