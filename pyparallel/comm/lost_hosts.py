"""Which hosts of this job are lost; every PeerError of this process names them from then on."""

from __future__ import annotations

from collections.abc import Sequence

# Where this very host is cut off, all others are lost to it.
_MOST_NAMED = 4

# What is told of each, and its ranks in torch's world.
_lost: dict[str, tuple[int, ...]] = {}


def forget_lost() -> None:
    """A new world begins, of hosts that are there."""
    _lost.clear()


def tell_lost(told: str, ranks: Sequence[int]) -> None:
    """A host is lost, and with it these ranks of the world."""
    _lost[told] = tuple(ranks)


def lost_among(ranks: Sequence[int]) -> tuple[int, ...] | None:
    """The places in ``ranks``, which are of the world, of those on lost hosts; None if none is lost."""
    if not _lost:
        return None
    gone = {rank for of_host in _lost.values() for rank in of_host}
    return tuple(place for place, rank in enumerate(ranks) if rank in gone)


def naming_lost_hosts(message: str) -> str:
    """``message`` of an error, after the hosts that it comes from."""
    told = list(_lost)
    if len(told) > _MOST_NAMED:
        told[_MOST_NAMED:] = [f"so are {len(told) - _MOST_NAMED} more hosts"]
    return "; ".join([*(news for news in told if news not in message), message])
