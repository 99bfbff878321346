"""Where a (rank, piece) chunk lies among the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from pyparallel.cut.shares import part_sizes


class Layout:
    """Rows [M] of all ranks in rank order, each rank's share cut into nearly equal pieces.

    rows: M_r of every rank, uneven and zero allowed. pieces: C; 0 counts as one piece.
    """

    def __init__(self, rows: Sequence[int], *, pieces: int) -> None:
        if any(count < 0 for count in rows):
            raise ValueError(f"rows: expected counts of at least 0, got {list(rows)}")
        self.rows = tuple(rows)
        self.pieces = max(pieces, 1)
        self.offsets = (0, *accumulate(self.rows))
        cuts = (part_sizes(count, self.pieces) for count in self.rows)
        self._edges = [(0, *accumulate(sizes)) for sizes in cuts]

    @property
    def total(self) -> int:
        """M, the rows of all ranks."""
        return self.offsets[-1]

    @property
    def largest_piece(self) -> int:
        """Rows of the largest piece of any rank: what a landing slot must hold."""
        return max(-(-count // self.pieces) for count in self.rows)

    def local(self, rank: int, piece: int) -> slice:
        """Rows of a chunk within its rank's shard; piece -1 is the whole shard."""
        if piece < 0:
            return slice(0, self.rows[rank])
        return slice(self._edges[rank][piece], self._edges[rank][piece + 1])

    def rows_of(self, rank: int, piece: int = -1) -> slice:
        """Rows of a chunk among the rows of all ranks."""
        local = self.local(rank, piece)
        return slice(self.offsets[rank] + local.start, self.offsets[rank] + local.stop)
