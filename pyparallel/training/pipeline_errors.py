"""Errors of a pipeline's transport that say which stage waited, and who is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.comm.peer_watch import naming_lost_peers, peer_error_behind, retold

# What Gloo and NCCL say of a lost or silent peer; errors of a stage's own code are left as they are.
LOST = ("Connection", "Broken pipe", "gloo", "Gloo", "NCCL", "imed out")


@contextmanager
def named_errors(stages: Sequence[nn.Module], group: Group, what: str) -> Iterator[None]:
    """Inside, a rank that is lost, of this group or of any other, raises a PeerError that names stages.

    Args:
        stages: this rank's. group: the pipeline's ranks.
    """
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        own = ", ".join(str(stage.stage) for stage in stages)
        where = f"{what} on {own}, rank {group.rank} of pp={group.size}"
        # torch tells an error of a stage's own collectives, over tp or cp, as one of its own.
        if hidden := peer_error_behind(error):
            raise retold(hidden, f"{where}: {hidden}") from error
        cause = _transport_error(error)
        if cause is None:
            raise
        if group.size == 1:
            with naming_lost_peers(where):
                raise
        who = "a neighbour is gone or stuck"
        try:
            # Shared memory names the dead rank within a second.
            group.communicator.barrier()
        except RuntimeError as found:
            who = str(found)
        raise PeerError(f"{where}: {who} ({cause})") from error


def _transport_error(error: BaseException | None) -> str | None:
    """The first line of what the transport said, if that is what stopped a step."""
    while error is not None:
        lines = str(error).strip().splitlines()
        found = next((line for line in lines if any(word in line for word in LOST)), None)
        if found is not None:
            return found.strip()
        error = error.__cause__
    return None
