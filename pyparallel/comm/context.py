"""How a sequence is cut over the ranks of a context-parallel group, and who sees whom.

Legend: S tokens of the whole sequence, R ranks, S_r the tokens of rank r.

Zigzag: the sequence is cut into 2R nearly equal chunks and rank r holds chunks r and 2R-1-r, an early
one and a late one. Under a causal mask every rank then has the same work, step for step of a ring; with
one contiguous part a rank, the last rank would have (2R-1) times the first one's.
Source: Llama 3 report (2024), section 3.3.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.cut.shard import Range, Sharding, even_parts
from pyparallel.cut.shares import part_sizes

ALGORITHMS = ("auto", "ring", "ulysses")
Boundaries = tuple[int, ...]


def zigzag_parts(length: int, parts: int, *, dim: int = 1) -> Sharding:
    """Rank r's ranges are chunks r and 2R-1-r of 2R; sizes differ by at most one.

    >>> zigzag_parts(8, 2).ranges
    (((0, 2), (6, 8)), ((2, 4), (4, 6)))
    """
    sizes = part_sizes(length, 2 * parts)
    starts = [sum(sizes[:chunk]) for chunk in range(2 * parts)]

    def chunk(index: int) -> Range:
        return starts[index], starts[index] + sizes[index]

    ranges = tuple((chunk(rank), chunk(2 * parts - 1 - rank)) for rank in range(parts))
    return Sharding(dim, length, ranges)


@dataclass(frozen=True)
class ContextShards:
    """One call's sequences, cut over the ranks of ``group``.

    Attributes:
        group: the context-parallel ranks.
        sharding: which positions each rank holds, ascending; along axis 1 of [B, S, ...].
        documents: where the documents packed into a sequence begin and end, ``(0, ..., S)``; one tuple
            for all sequences of the batch, or one each; None: every sequence is one document. A token
            sees tokens of its own document only.
        algorithm: "ring", "ulysses", or "auto": see
            :func:`pyparallel.ops.context.choice.choose`.
    """

    group: Group
    sharding: Sharding
    documents: tuple[Boundaries, ...] | None = None
    algorithm: str = "auto"

    @classmethod
    def of(
        cls,
        length: int,
        group: Group,
        *,
        layout: str = "zigzag",
        documents: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
        algorithm: str = "auto",
    ) -> ContextShards:
        """Cut ``length`` tokens a sequence.

        Args:
            layout: "zigzag", which balances causal attention, or "contiguous".
            documents: cumulative lengths ``[0, ..., S]`` (cu_seqlens) of all sequences, or one list for
                each, or document ids as a tensor [B, S], equal within a document.

        Raises:
            ValueError: an unknown layout or algorithm, or boundaries that do not go up from 0 to S.
        """
        if layout not in ("zigzag", "contiguous"):
            raise ValueError(f"layout: expected 'zigzag' or 'contiguous', got {layout!r}")
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}"
            )
        if layout == "zigzag":
            sharding = zigzag_parts(length, group.size)
        else:
            sharding = even_parts(length, group.size, dim=1)
        return cls(group, sharding, _boundaries(documents, length), algorithm)

    @property
    def length(self) -> int:
        """S."""
        return self.sharding.length

    @property
    def sizes(self) -> list[int]:
        """S_r of each rank."""
        return self.sharding.sizes

    def split(self, tensor: Tensor) -> Tensor:
        """This rank's part of a replicated ``[B, S, ...]``: ids, targets, weights of a loss."""
        return self.sharding.split(tensor, self.group.rank)

    def positions(
        self, *, device: torch.device | str | None = None, in_documents: bool = False
    ) -> Tensor:
        """The positions of this rank's tokens: [1, S_r], or [B, S_r] counted anew in each sequence's
        documents."""
        held = self.sharding.ranges[self.group.rank]
        own = torch.cat([torch.arange(start, stop, device=device) for start, stop in held])
        if not in_documents or self.documents is None:
            return own.unsqueeze(0)
        rows = []
        for boundaries in self.documents:
            starts = torch.tensor(boundaries[:-1], device=device)
            rows.append(own - starts[torch.bucketize(own, starts, right=True) - 1])
        return torch.stack(rows)

    def dense_order(self) -> Tensor | None:
        """Which place of the ranks' joined parts each position has, [S]; None where it is its own."""
        if self.sharding.in_order:
            return None
        held = [piece for ranges in self.sharding.ranges for piece in ranges]
        return torch.argsort(torch.cat([torch.arange(start, stop) for start, stop in held]))

    def rank_order(self) -> Tensor | None:
        """Which position each place of the ranks' joined parts has: the inverse of dense_order."""
        if self.sharding.in_order:
            return None
        held = [piece for ranges in self.sharding.ranges for piece in ranges]
        return torch.cat([torch.arange(start, stop) for start, stop in held])


def check_length(length: int, group: Group) -> None:
    """Every rank has a token.

    Raises:
        ValueError: fewer tokens than ranks.
    """
    if length < group.size:
        raise ValueError(
            f"sequence: expected at least a token for each of the cp={group.size} ranks, got "
            f"{length}; use a smaller cp, or pack or pad the sequences"
        )


def _boundaries(
    documents: Sequence[int] | Sequence[Sequence[int]] | Tensor | None, length: int
) -> tuple[Boundaries, ...] | None:
    if documents is None:
        return None
    if isinstance(documents, Tensor) and documents.dim() == 2:
        rows = [_from_ids(row, length) for row in documents]
    else:
        listed = documents.tolist() if isinstance(documents, Tensor) else list(documents)
        rows = listed if listed and not isinstance(listed[0], int) else [listed]
    for row in rows:
        ascending = all(a <= b for a, b in itertools.pairwise(row))
        if len(row) < 2 or row[0] != 0 or row[-1] != length or not ascending:
            raise ValueError(
                f"documents: expected ascending boundaries from 0 to the sequence's {length}, "
                f"got {list(row)}"
            )
    distinct = {tuple(row) for row in rows}
    return tuple(tuple(row) for row in rows) if len(distinct) > 1 else (distinct.pop(),)


def _from_ids(ids: Tensor, length: int) -> list[int]:
    if ids.shape[0] != length:
        raise ValueError(f"documents: expected ids [B, {length}], got {ids.shape[0]} a sequence")
    changes = (torch.nonzero(ids[1:] != ids[:-1]).flatten() + 1).tolist()
    return [0, *changes, length]
