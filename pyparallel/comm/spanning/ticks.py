"""Slices of a tensor on their way through several stages at once: a pipeline that cannot deadlock.

A slice is a generator; what it does between two ``yield``s is a stage. Slice j does its stage p at tick
j + p, so while one slice is summed here the one before it is on its way and the one before that arrives.

Why nobody waits for ever. All ranks run as many slices with as many stages. A stage waits only for
messages that other ranks start in an **earlier stage of the same slice**, and starting one waits for
nobody; between ticks a rank waits only until its machine's ranks have ended the same tick. Were there
ticks that never end, take one with the least number t: the messages it waits for were started at ticks
before t, and all ranks came to t, since every tick before it ended. So it ends, and there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

Slice = Iterator[None]


def in_ticks(slices: Iterable[Slice], between: Callable[[], None]) -> None:
    """Run slices of equally many stages, one more of them under way at each tick.

    Args:
        between: called between two ticks.
    """
    under_way: deque[Slice] = deque()
    waiting = iter(slices)
    first = True
    while True:
        slice = next(waiting, None)
        if slice is not None:
            under_way.appendleft(slice)
        if not under_way:
            return
        if not first:
            between()
        first = False
        _tick(under_way)


def ticks(count: int) -> Slice:
    """``count`` stages in which a slice does nothing here."""
    for _ in range(count):
        yield


def _tick(under_way: deque[Slice]) -> None:
    """A stage of every slice, the youngest first: it sends what others wait for."""
    ended = object()
    for slice in tuple(under_way):
        if next(slice, ended) is ended:
            under_way.remove(slice)
