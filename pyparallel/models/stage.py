"""How a model is cut by its layers over pipeline-parallel ranks, and what a stage holds.

A stage is a run of consecutive layers; the first one also has the embedding, the last one the final norm
and the head. Parameters keep the names they have in the whole model (``layers.7.mlp.up_proj.weight``),
so state dicts and checkpoints are the same on every mesh.

Legend: L layers, P ranks, v stages a rank, P v stages in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from pyparallel.layers.parallel_mlp import GATED
from pyparallel.models.config import DecoderConfig

BALANCES = ("compute", "memory")
ORDERS = ("loop", "v")


@dataclass(frozen=True)
class Stage:
    """One stage of a model.

    Attributes:
        index: its place, ``0 <= index < count``.
        count: how many stages the model has.
        layers: the numbers of its layers in the whole model.
    """

    index: int
    count: int
    layers: range

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """A model that is not cut."""
        return cls(0, 1, range(num_layers))

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.index == self.count - 1

    def __str__(self) -> str:
        first, last = self.layers.start, self.layers.stop - 1
        return f"stage {self.index} of {self.count} (layers {first} to {last})"


class Layers(nn.ModuleList):
    """A stage's layers, named by their numbers in the whole model; ``layers[0]`` is its first."""

    def __init__(self, layers: Iterator[nn.Module], numbers: range) -> None:
        super().__init__()
        for number, layer in zip(numbers, layers, strict=True):
            self.add_module(str(number), layer)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self._modules.values())[index]


def partition(
    costs: Sequence[float], parts: int, *, first: float = 0.0, last: float = 0.0
) -> list[range]:
    """Cut layers of these costs into consecutive parts whose largest cost is the smallest possible.

    Of all such cuts the one with the smallest sum of squares, the most even; both by dynamic
    programming, exactly.

    Args:
        first, last: what the first and the last part cost beside their layers.

    Raises:
        ValueError: more parts than layers, or none.

    >>> partition([1, 1, 1, 1, 1], 2, last=2)
    [range(0, 3), range(3, 5)]
    """
    if not 1 <= parts <= len(costs):
        raise ValueError(
            f"stages: expected 1 to {len(costs)}, a layer each at the least, got {parts}; "
            f"use a smaller pp (or fewer stages a rank)"
        )
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def cost_of(part: int, start: int, stop: int) -> float:
        ends = (first if part == 0 else 0.0) + (last if part == parts - 1 else 0.0)
        return before[stop] - before[start] + ends

    limit, _ = _best_cut(len(costs), parts, cost_of, max)
    _, cuts = _best_cut(
        len(costs),
        parts,
        # Rounding may not make the best cut itself too large.
        lambda *part: c**2 if (c := cost_of(*part)) <= limit * (1 + 1e-9) else math.inf,
        lambda a, b: a + b,
    )
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def _best_cut(length: int, parts: int, cost_of, join) -> tuple[float, list[int]]:
    """The smallest joined cost of ``parts`` non-empty ranges of ``length``, and their boundaries."""
    # best[stop] = (cost, boundaries) of the parts so far over the first `stop` layers.
    best = {0: (0.0, [0])}
    for part in range(parts):
        left = parts - 1 - part
        stops = range(part + 1, length - left + 1) if left else (length,)
        best = {
            stop: min(
                (
                    (join(cost, cost_of(part, start, stop)), [*cuts, stop])
                    for start, (cost, cuts) in best.items()
                    if start < stop
                ),
                key=lambda found: found[0],
            )
            for stop in stops
        }
    return best[length]


def stages_of(config: DecoderConfig, count: int, *, balance: str = "compute") -> list[Stage]:
    """All stages of a decoder.

    Args:
        count: how many; each has a layer at least.
        balance: "compute": by the parameters a token is multiplied with, the head's among them; the
            embedding is a lookup and costs nothing. "memory": by all parameters, the embedding's too.

    Raises:
        ValueError: more stages than layers, or another balance.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance: expected one of {', '.join(BALANCES)}, got {balance!r}")
    vocabulary = float(config.vocab_size * config.hidden_size)
    looked_up = vocabulary + (0 if config.rotary_dim else config.max_positions * config.hidden_size)
    ranges = partition(
        [float(_layer_parameters(config))] * config.num_layers,
        count,
        first=looked_up if balance == "memory" else 0.0,
        last=vocabulary,
    )
    return [Stage(index, count, layers) for index, layers in enumerate(ranges)]


def stages_of_rank(ranks: int, rank: int, chunks: int, *, order: str = "loop") -> list[int]:
    """Which stages a rank holds, of ``ranks * chunks``.

    Args:
        order: "loop": stage s lies on rank s mod P (interleaved schedules). "v": there and back again,
            so that rank 0 has the first and the last stage (zero-bubble V).

    >>> stages_of_rank(2, 0, 2), stages_of_rank(2, 0, 2, order="v")
    ([0, 2], [0, 3])
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    back = order == "v"
    return [
        chunk * ranks + (ranks - 1 - rank if back and chunk % 2 else rank)
        for chunk in range(chunks)
    ]


def _layer_parameters(config: DecoderConfig) -> int:
    """The matrices of one layer."""
    heads = config.num_heads + 2 * config.num_kv_heads + config.num_heads
    matrices = 3 if config.activation in GATED else 2
    return config.hidden_size * (heads * config.head_dim + matrices * config.intermediate_size)


def tied_copies(model: nn.Module) -> dict[str, str]:
    """This rank's parameters that are copies of a parameter which another stage owns.

    A tied embedding lies on the first stage, which owns it, and, as the head, on the last one. Such a
    parameter is trained on both and must be counted and saved once.

    Returns:
        own name (in ``model.named_parameters()``, wrappers' prefixes included): the owner's name in the
        whole model. Empty for a model that is not cut.
    """
    return {
        f"{prefix}.{name}" if prefix else name: owner
        for prefix, module in model.named_modules()
        for name, owner in getattr(module, "tied_copies", {}).items()
    }
