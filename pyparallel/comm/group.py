"""A group: which rank of how many this process is, and what it talks through."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.cut.shares import Shares, are_equal, check_shares

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Group:
    """R ranks along one axis of the mesh. Passed to layers and functions, never global.

    Attributes:
        rank: this process's place, ``0 <= rank < size``.
        size: R, the number of ranks.
        communicator: the engine its collectives run on.
        shares: of what is cut over the group, each rank's part in lowest terms; equal by default.
        handle: a number that stands for this group in compiled graphs of this process.
    """

    rank: int
    size: int
    communicator: Communicator
    shares: Shares = ()
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank: expected 0 <= rank < size={self.size}, got {self.rank}")
        equal = (1,) * self.size
        shares = check_shares("shares", self.shares, self.size) if self.shares else equal
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "handle", next(_handles))
        _by_handle[self.handle] = self

    @classmethod
    def of_handle(cls, handle: int) -> Group:
        """The group that ``handle`` stands for, as long as somebody holds it."""
        group = _by_handle.get(handle)
        if group is None:
            raise ValueError(f"handle: expected one of a living group, got {handle}")
        return group

    @classmethod
    def over(cls, communicator: Communicator, shares: Shares = ()) -> Group:
        """The group of all ranks of ``communicator``."""
        return cls(communicator.rank, communicator.size, communicator, shares)

    @classmethod
    def single(cls) -> Group:
        """The group of one rank, which needs no peers and no process group."""
        return cls.over(LocalCommunicator())

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        # A copied module still talks to the same peers.
        return self

    def __repr__(self) -> str:
        shares = "" if are_equal(self.shares) else f", shares={self.shares}"
        return f"Group('{self.communicator.name}', rank={self.rank}, size={self.size}{shares})"
