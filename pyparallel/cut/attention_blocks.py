"""Which queries see which keys, as rectangles that a dense attention kernel can run.

A rank's queries and some rank's keys are each a few ranges of positions. Cut at document boundaries too,
they fall into pairs of pieces of which one sees the other whole, as a causal square, or not at all; so
document masks cost no mask, and no work on what is not seen. Only the edge of a sliding window needs a
mask. Legend: S_r this rank's queries, T_c the keys of the rank they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor

from pyparallel.cut.shard import Range


@dataclass(frozen=True)
class Block:
    """Queries ``q`` see keys ``k`` (both local (start, stop)) of sequences ``rows``.

    Attributes:
        rows: (start, stop) of the batch; None: all.
        causal: a square of which query i sees keys up to i; else all keys are seen, but for ``window``.
        shift: with a window: the first query's position less the first key's.
        window: how many keys, its own included, a query sees; None where that cuts nothing off.
    """

    q: Range
    k: Range
    causal: bool = False
    rows: Range | None = None
    shift: int = 0
    window: int | None = None

    def mask(self, device: torch.device) -> Tensor | None:
        """[1, 1, S, T], true where a query sees a key; None where ``causal`` says it all."""
        if self.window is None:
            return None
        queries = torch.arange(self.q[1] - self.q[0], device=device).unsqueeze(1) + self.shift
        behind = queries - torch.arange(self.k[1] - self.k[0], device=device)
        seen = behind < self.window
        return ((behind >= 0) & seen if self.causal else seen).view(1, 1, *behind.shape)


@dataclass(frozen=True)
class _Piece:
    """Consecutive positions of one document that lie one after another in a rank's shard."""

    document: int
    start: int
    stop: int
    local: int

    @property
    def here(self) -> Range:
        return self.local, self.local + self.stop - self.start


def plan_blocks(
    query_ranges: tuple[Range, ...],
    key_ranges: tuple[Range, ...],
    *,
    causal: bool,
    window: int | None = None,
    documents: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[Block, ...]:
    """The blocks of a rank's queries and a rank's keys.

    Args:
        query_ranges, key_ranges: positions; two ranges are the same or don't overlap.
        documents: boundaries, for all sequences or for each (:class:`ContextShards`).

    Raises:
        ValueError: a window without causality, or ranges that overlap in part.
    """
    if window is not None and (not causal or window < 1):
        raise ValueError(
            f"window: expected at least 1 key, under causal attention; got {window}, causal={causal}"
        )
    return _plan(query_ranges, key_ranges, causal, window, documents)


@lru_cache(maxsize=4096)
def _plan(
    query_ranges: tuple[Range, ...],
    key_ranges: tuple[Range, ...],
    causal: bool,
    window: int | None,
    documents: tuple[tuple[int, ...], ...] | None,
) -> tuple[Block, ...]:
    if documents is None or len(documents) == 1:
        boundaries = () if documents is None else documents[0]
        return tuple(_row_blocks(query_ranges, key_ranges, causal, window, boundaries, None))
    blocks: list[Block] = []
    # Neighbouring sequences that are cut alike run together.
    for _, same in groupby(range(len(documents)), key=documents.__getitem__):
        members = list(same)
        rows = members[0], members[-1] + 1
        cut = documents[members[0]]
        blocks += _row_blocks(query_ranges, key_ranges, causal, window, cut, rows)
    return tuple(blocks)


def _row_blocks(
    query_ranges: tuple[Range, ...],
    key_ranges: tuple[Range, ...],
    causal: bool,
    window: int | None,
    boundaries: Sequence[int],
    rows: Range | None,
) -> list[Block]:
    queries = _pieces(query_ranges, boundaries)
    keys = _pieces(key_ranges, boundaries)
    if causal and window is None and query_ranges == key_ranges:
        # A rank's positions ascend, so its own tokens of one document are one causal square.
        squares = [_Piece(p.document, p.local, p.here[1], p.local) for p in queries]
        joined = _join(squares)
        return [Block(p.here, p.here, True, rows) for p in joined]
    of_document: dict[int, list[_Piece]] = {}
    for key in keys:
        of_document.setdefault(key.document, []).append(key)
    pairs = (
        _pair(query, key, causal, window, rows)
        for query in queries
        for key in of_document.get(query.document, ())
    )
    return _merged([block for block in pairs if block is not None])


def _pieces(ranges: tuple[Range, ...], boundaries: Sequence[int]) -> list[_Piece]:
    """The ranges, cut at document boundaries; without empty ones."""
    pieces, local = [], 0
    cuts = boundaries or (0, max((stop for _, stop in ranges), default=0))
    for start, stop in ranges:
        for document, (first, last) in enumerate(pairwise(cuts)):
            low, high = max(start, first), min(stop, last)
            if low < high:
                pieces.append(_Piece(document, low, high, local + low - start))
        local += stop - start
    return pieces if boundaries else _join(pieces)


def _join(pieces: list[_Piece]) -> list[_Piece]:
    """Pieces of one document that follow each other, as one."""
    joined: list[_Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.document == piece.document and last.stop == piece.start:
            joined[-1] = _Piece(last.document, last.start, piece.stop, last.local)
        else:
            joined.append(piece)
    return joined


def _pair(
    query: _Piece, key: _Piece, causal: bool, window: int | None, rows: Range | None
) -> Block | None:
    square = (query.start, query.stop) == (key.start, key.stop)
    if not square and query.start < key.stop and key.start < query.stop:
        raise ValueError(
            f"ranges: expected the same or disjoint ones, got {(query.start, query.stop)} "
            f"and {(key.start, key.stop)}"
        )
    if causal and key.start >= query.stop:
        return None
    shift = query.start - key.start
    if window is None:
        return Block(query.here, key.here, causal and square, rows)
    if query.start - (key.stop - 1) >= window:
        return None
    reaches_all = query.stop - 1 - key.start < window
    return Block(query.here, key.here, square, rows, shift, None if reaches_all else window)


def _merged(blocks: list[Block]) -> list[Block]:
    """Whole rectangles that share a side, as one: fewer and larger calls."""
    merged: list[Block] = []
    for block in blocks:
        last = merged[-1] if merged else None
        if (
            last is not None
            and _whole(last)
            and _whole(block)
            and last.q == block.q
            and last.k[1] == block.k[0]
        ):
            merged[-1] = Block(last.q, (last.k[0], block.k[1]), False, last.rows)
        else:
            merged.append(block)
    stacked: list[Block] = []
    for block in merged:
        last = stacked[-1] if stacked else None
        if (
            last is not None
            and _whole(last)
            and _whole(block)
            and last.k == block.k
            and last.q[1] == block.q[0]
        ):
            stacked[-1] = Block((last.q[0], block.q[1]), last.k, False, last.rows)
        else:
            stacked.append(block)
    return stacked


def _whole(block: Block) -> bool:
    return not block.causal and block.window is None
