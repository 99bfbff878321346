"""What a pipeline must know of its group, and of the way its schedule was chosen to take."""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.overlap.layout import Layout


@dataclass(frozen=True)
class Plan:
    """How one group overlaps: its place in it, the rows of every rank, and the schedule's choices.

    rows: M_r of every rank. pieces: C of the schedules, 0 to not overlap. transport: see `gather.py`.
    slots: see `all_gather_linear`.
    """

    rank: int
    rows: tuple[int, ...]
    pieces: int
    transport: str = "direct"
    slots: int | None = None

    @property
    def size(self) -> int:
        """R."""
        return len(self.rows)

    @property
    def used_transport(self) -> str:
        """The path that is not overlapped is the library's collective."""
        return self.transport if self.pieces else "direct"

    @property
    def scatter_transport(self) -> str:
        """Partial sums are added at their owner, so no ring carries them."""
        return "copy" if self.used_transport == "copy" else "direct"

    def layout(self) -> Layout:
        """Where each chunk lies."""
        return Layout(self.rows, pieces=self.pieces)
