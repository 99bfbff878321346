"""Which way a linear layer takes: pieces, transport and multiplier, by the model or by measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyparallel.overlap.gather import SCATTER_TRANSPORTS
from pyparallel.overlap.machine import H100, Machine
from pyparallel.overlap.predict import OPERATIONS, predict

# Pieces a shard may be cut into; 0 is the path that does not overlap.
PIECES = (0, 1, 2, 4, 8)
# A library multiplies 512 rows in another order than 1024: with whole shards as chunks the overlapped
# path has the matmuls of the plain one, and so its bits. More pieces need a matmul whose rows do not
# depend on how many there are: our Triton kernel, with the tiles of the whole shard.
MULTIPLIERS: Mapping[str, tuple[int, ...]] = {"library": (0, 1), "triton": (1, 2, 4, 8)}
# Of the library's speed, where nothing was measured. Triton's own benchmarks of bf16 matmuls lie between
# 0.85 and 1.0 of cuBLAS.
TRITON_SPEED = 0.9


@dataclass(frozen=True)
class Choice:
    """pieces: C of the schedules. transport: see `gather.py`. multiplier: a key of `MULTIPLIERS`.

    The bits depend on the multiplier alone.
    """

    pieces: int = 0
    transport: str = "direct"
    multiplier: str = "library"

    @property
    def label(self) -> str:
        """As measurements name it."""
        return f"{self.pieces}/{self.transport}/{self.multiplier}"


PLAIN = Choice()


def choices(
    *,
    transports: Iterable[str] = SCATTER_TRANSPORTS,
    multipliers: Iterable[str] = ("library",),
) -> tuple[Choice, ...]:
    """Every choice of these, the plain path first."""
    found = [PLAIN]
    for multiplier in multipliers:
        for transport in transports:
            pieces = [p for p in MULTIPLIERS[multiplier] if p > 0]
            found += [Choice(p, transport, multiplier) for p in pieces]
    return tuple(found)


def seconds_of(
    operation: str,
    choice: Choice,
    *,
    m: int,
    k: int,
    n: int,
    size: int,
    machine: Machine = H100,
) -> float:
    """What the model says a choice takes."""
    speed = TRITON_SPEED if choice.multiplier == "triton" else 1.0
    return predict(
        operation,
        m=m,
        k=k,
        n=n,
        size=size,
        pieces=choice.pieces,
        transport=choice.transport,
        machine=machine.slowed(speed),
    ).total


@lru_cache(maxsize=4096)
def choose(
    operation: str,
    *,
    m: int,
    k: int,
    n: int,
    size: int,
    machine: Machine = H100,
    among: tuple[Choice, ...],
) -> Choice:
    """The fastest by the model; the plain path wins ties, so overlapping is never a loss by it."""
    if size == 1:
        return PLAIN
    least_rows = min(rows for rows, _, _ in machine.tiles)
    usable = [c for c in among if c.pieces == 0 or m // size // c.pieces >= least_rows]
    shape = {"m": m, "k": k, "n": n, "size": size, "machine": machine}
    return min(usable, key=lambda c: (seconds_of(operation, c, **shape), c.pieces, c.label))


class ChoiceTable:
    """Measured choices, by operation and shape; the model where nothing was measured."""

    def __init__(self, *, machine: Machine = H100) -> None:
        self.machine = machine
        self.measured: dict[tuple[str, int, int, int, int], dict[Choice, float]] = {}

    def add(self, entries: Iterable[Mapping[str, Any]], *, source: str = "entries") -> None:
        """Adds measurements: {"operation", "size", "m", "k", "n", "seconds": {Choice.label: seconds}}.

        Raises ValueError if one is not like that, or was not measured for the plain path.
        """
        for position, entry in enumerate(entries):
            where = f"{source}: entry {position}"
            try:
                key = (entry["operation"], *(int(entry[name]) for name in ("size", "m", "k", "n")))
                seconds = {_choice(label): float(t) for label, t in entry["seconds"].items()}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{where}: expected operation, size, m, k, n and seconds by "
                    f"pieces/transport/multiplier, got {entry!r}"
                ) from error
            if key[0] not in OPERATIONS or PLAIN not in seconds:
                raise ValueError(
                    f"{where}: expected one of {sorted(OPERATIONS)} and a measurement of "
                    f"{PLAIN.label!r} (the plain path), got {key[0]!r} and "
                    f"{sorted(c.label for c in seconds)}"
                )
            self.measured[key] = seconds

    def choose(
        self, operation: str, *, m: int, k: int, n: int, size: int, among: tuple[Choice, ...]
    ) -> Choice:
        """One of `among`, the plain path being one; never one measured, or predicted, to lose."""
        seconds = self.measured.get((operation, size, m, k, n))
        if seconds is not None:
            usable = [c for c in seconds if c in among]
            return min(usable, key=lambda c: (seconds[c], c.pieces))
        return choose(operation, m=m, k=k, n=n, size=size, machine=self.machine, among=among)


def _choice(label: str) -> Choice:
    pieces, transport, multiplier = label.split("/")
    if multiplier not in MULTIPLIERS:
        raise ValueError(f"multiplier: expected one of {sorted(MULTIPLIERS)}, got {multiplier!r}")
    return Choice(int(pieces), transport, multiplier)
