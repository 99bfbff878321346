"""A group: which rank of how many this process is, and what it talks through."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.local_engine import LocalCommunicator

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Group:
    """R ranks along one axis of the mesh. Passed to layers and functions, never global.

    Attributes:
        rank: this process's place, ``0 <= rank < size``.
        size: R, the number of ranks.
        communicator: the engine its collectives run on.
        handle: a number that stands for this group in compiled graphs of this process.
    """

    rank: int
    size: int
    communicator: Communicator
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank: expected 0 <= rank < size={self.size}, got {self.rank}")
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
    def over(cls, communicator: Communicator) -> Group:
        """The group of all ranks of ``communicator``."""
        return cls(communicator.rank, communicator.size, communicator)

    @classmethod
    def single(cls) -> Group:
        """The group of one rank, which needs no peers and no process group."""
        return cls.over(LocalCommunicator())

    def __deepcopy__(self, memo: dict) -> Group:
        # A copied module still talks to the same peers.
        return self

    def __repr__(self) -> str:
        return f"Group('{self.communicator.name}', rank={self.rank}, size={self.size})"
