"""What each rank holds of each matrix, read from the modules' own shardings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from pyparallel.cut.shard import Sharding
from pyparallel.layers.parallel_mlp import GATED
from pyparallel.models.decoder import Decoder


@dataclass(frozen=True)
class Part:
    """A range of the axis that is cut, and who holds it: several ranks where it is replicated."""

    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class MatrixCut:
    """One dense matrix ``[rows, columns]`` as the ranks hold it.

    Attributes:
        axis: which axis is cut: 0, rows (output features), or 1, columns (input features).
        parts: of that axis, in order, without gaps.
        module: the parallel module that holds it, by its name in a decoder of one layer.
    """

    name: str
    rows: int
    columns: int
    axis: int
    parts: tuple[Part, ...]
    module: str

    @property
    def numbers(self) -> int:
        """Of the dense matrix."""
        return self.rows * self.columns

    def held(self, rank: int) -> int:
        """Numbers of it that a rank holds."""
        across = self.columns if self.axis == 0 else self.rows
        return across * sum(p.stop - p.start for p in self.parts if rank in p.ranks)


def parts_of(sharding: Sharding, start: int, stop: int) -> tuple[Part, ...]:
    """The parts of ``start`` to ``stop`` of the sharding's axis, counted from ``start``.

    >>> parts_of(Sharding(0, 4, (((0, 2),), ((1, 4),))), 0, 4)[1]
    Part(start=1, stop=2, ranks=(0, 1))
    """
    held = [
        (max(a, start), min(b, stop), rank)
        for rank, ranges in enumerate(sharding.ranges)
        for a, b in ranges
        if max(a, start) < min(b, stop)
    ]
    edges = sorted({start, stop, *(edge for a, b, _ in held for edge in (a, b))})
    found: list[Part] = []
    for low, high in itertools.pairwise(edges):
        ranks = tuple(rank for a, b, rank in held if a <= low and high <= b)
        if found and found[-1].ranks == ranks:
            low = found.pop().start + start
        found.append(Part(low - start, high - start, ranks))
    return tuple(found)


def matrices_of(model: Decoder) -> list[MatrixCut]:
    """The matrices of a decoder of one layer, in the order in which a token meets them.

    What a module stores as one, such as queries, keys and values, are several here.
    """
    config = model.config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    gate = (("gate", config.intermediate_size),) if config.activation in GATED else ()
    stored = [
        ("embedding", (("embedding", config.vocab_size),)),
        ("layers.0.attention.qkv_proj", (("query", queries), ("key", keys), ("value", keys))),
        ("layers.0.attention.out_proj", (("attention out", queries),)),
        ("layers.0.mlp.up_proj", (*gate, ("up", config.intermediate_size))),
        ("layers.0.mlp.down_proj", (("down", config.intermediate_size),)),
        ("head", (("LM head", config.vocab_size),)),
    ]
    found = []
    for name, sections in stored:
        module = model.get_submodule(name)
        sharding, (rows, columns) = module.shardings["weight"], module.dense_shapes["weight"]
        start = 0
        for section, length in sections:
            parts = parts_of(sharding, start, start + length)
            shape = (length, columns) if sharding.dim == 0 else (rows, length)
            found.append(MatrixCut(section, *shape, sharding.dim, parts, name))
            start += length
        assert start == sharding.length, f"{name}: {start} of {sharding.length} are named"
    return found
