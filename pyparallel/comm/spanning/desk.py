"""What the ranks of one machine lay open to each other from one tick to the next.

Every rank has memory that its neighbours read in place, in two halves that are used by turns: what is
shown at a tick is read at the next one. After a tick at which anything was shown each rank waits until
all have ended it: then its half may be read, and nobody reads the other any more, which is the next to
be written. At the last tick of a call nothing is shown.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import _C
from pyparallel.comm.shared.engine import SharedMemoryCommunicator

# The two places of a half: what a rank puts into a call, and what it got from other machines.
PUT_IN, GOT = range(2)


class Desk:
    """The shared memory of a machine's ranks; a rank that is alone there needs none.

    Args:
        num_bytes: the most that is shown of what is put in; of what was got it is half as much.
    """

    def __init__(self, inside: SharedMemoryCommunicator, num_bytes: int) -> None:
        self._inside = inside
        self._starts = (0, num_bytes)
        self._half = num_bytes + num_bytes // 2
        self._buffer: _C.SharedBuffer | None = None
        # By turn and rank.
        self._memory: list[list[Tensor]] = []
        self._turn = 0
        self._call = 0
        self._shown = False

    def begin(self, call: int) -> None:
        """A call of all ranks begins, to which all give the same number."""
        self._call = call
        if self._buffer is None and self._inside.size > 1:
            self._buffer = _C.SharedBuffer(self._inside.free_engine(), self._half)
            self._memory = [
                [
                    torch.frombuffer(self._buffer.memory(rank, turn), dtype=torch.uint8)
                    for rank in range(self._inside.size)
                ]
                for turn in range(2)
            ]

    def next_tick(self) -> None:
        """Wait, if anything was shown, until all ranks of this machine have ended this tick.

        Raises:
            PeerError: one of them is dead, stuck, or makes another call.
        """
        if self._buffer is not None and self._shown:
            self._buffer.announce(self._call, 0)
            self._buffer.await_all()
            self._turn ^= 1
            self._shown = False

    def show(self, place: int, piece: Tensor, start: int = 0) -> None:
        """Let the others read ``piece`` at the next tick, ``start`` elements into the place.

        A call of all ranks of the machine, at the same tick; those who have nothing show an empty one.
        """
        self._shown = True
        if self._buffer is not None and piece.numel():
            self._part(self._turn, place, self._inside.rank, piece, start).copy_(piece)

    def read(self, place: int, rank: int, like: Tensor, start: int = 0) -> Tensor:
        """What local ``rank`` showed at the tick before, as long as ``like``; for this tick."""
        return self._part(self._turn ^ 1, place, rank, like, start)

    def close(self) -> None:
        """Give the memory back."""
        self._memory, self._buffer = [], None

    def _part(self, turn: int, place: int, rank: int, like: Tensor, start: int) -> Tensor:
        first = self._starts[place] + start * like.itemsize
        memory = self._memory[turn][rank][first : first + like.numel() * like.itemsize]
        return memory.view(like.dtype)
