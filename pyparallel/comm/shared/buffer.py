"""Tensors of one rank that the other ranks of its machine read in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel import _C


class SharedBuffer:
    """Memory of every rank, in two halves used in turn: write, announce, await, read.

    What :meth:`of` returns may be read until this rank announces again: then the owner may write there.

    Args:
        engine: the group's.
        rank, size: this rank's place in it.
        num_bytes: the most that one turn can hold; the same on all ranks.
    """

    def __init__(self, engine: _C.SharedMemoryGroup, rank: int, size: int, num_bytes: int) -> None:
        self._buffer = _C.SharedBuffer(engine, num_bytes)
        self.rank = rank
        self._turn = 0
        self._halves = [
            [
                torch.frombuffer(self._buffer.memory(owner, turn), dtype=torch.uint8)
                for owner in range(size)
            ]
            for turn in range(2)
        ]

    @property
    def num_bytes(self) -> int:
        """What one turn can hold."""
        return self._buffer.bytes

    def of(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in ``rank``'s memory of this turn, ``offset`` elements in.

        This rank's own is for writing until :meth:`announce`; another's for reading after
        :meth:`await_all`.
        """
        numel = torch.Size(shape).numel()
        start = offset * dtype.itemsize
        piece = self._halves[self._turn][rank][start : start + numel * dtype.itemsize]
        return piece.view(dtype).view(shape)

    def announce(self, num_bytes: int, code: int) -> None:
        """This rank's part is written. The arguments, which errors name, must agree on all ranks."""
        self._buffer.announce(num_bytes, code)

    def await_all(self) -> None:
        """Wait until all ranks have announced.

        Raises:
            PeerError: one of them died, is stuck, or makes another call.
        """
        self._buffer.await_all()

    def next_turn(self) -> None:
        """This turn's parts have been read."""
        self._turn ^= 1


def sum_parts(parts: Sequence[Tensor], output: Tensor, code: int) -> None:
    """``output`` = the sum of the parts, all contiguous, in their order, in fp32, rounded once."""
    addresses = [part.data_ptr() for part in parts]
    _C.sum_parts(output.data_ptr(), addresses, output.numel(), code)
