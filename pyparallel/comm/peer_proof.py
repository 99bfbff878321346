"""That whoever sits at the other end of a group's connections was started by the same launch.

Gloo's listener takes whoever says the next number first, and any user of the machine can reach the
loopback interface. So every two ranks of a group show each other, through those connections, what only
ranks of one launch can compute: HMAC-SHA256 over the group, the sender and the receiver, under a secret
that the launcher handed down through inherited memory. Who merely connects is ignored.
"""

from __future__ import annotations

import hmac
from hashlib import sha256

import torch
import torch.distributed as dist

from pyparallel.comm.communicator import PeerError

_secret: bytes | None = None
_proven: set[str] = set()


def know(secret: bytes) -> None:
    """Take the launch's secret; without one nothing is proven, as under torchrun."""
    global _secret
    _secret = secret
    _proven.clear()


def prove(process_group: dist.ProcessGroup) -> None:
    """A call of all ranks of ``process_group``, once for each group.

    Raises:
        PeerError: somebody else has taken a rank's place.
    """
    name, rank, size = process_group.group_name, process_group.rank(), process_group.size()
    if _secret is None or size == 1 or name in _proven:
        return
    if "gloo" not in dist.get_backend_config(process_group):
        return

    def token(sender: int, receiver: int) -> bytes:
        return hmac.digest(_secret, f"{name}/{sender}/{receiver}".encode(), sha256)

    shown = b"".join(token(rank, peer) for peer in range(size))
    seen = torch.empty(len(shown), dtype=torch.uint8)
    dist.all_to_all_single(
        seen, torch.frombuffer(bytearray(shown), dtype=torch.uint8), group=process_group
    )
    for peer, found in enumerate(seen.view(size, -1)):
        if not hmac.compare_digest(bytes(found.tolist()), token(peer, rank)):
            raise PeerError(
                f"group '{name}' (rank {rank} of {size}): another program has taken the place of "
                f"rank {peer} on this machine's loopback interface; nothing was sent to it"
            )
    _proven.add(name)
