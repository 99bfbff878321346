"""How many parameters each rank of each stage holds: cut as pyparallel's own modules cut them.

The cuts are those of :mod:`pyparallel.cut` and :mod:`pyparallel.models.stage`, called, not copied, so
what is counted here is what the modules allocate: uneven parts, replicated KV heads, norms and biases
behind a reduction on every rank, a tied head that is the embedding where one stage has both. Where a
function takes ``tp``, a tuple of shares (:mod:`pyparallel.cut.shares`) is tp ranks of those.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pyparallel.cut.shard import HeadLayout, features
from pyparallel.cut.shares import Parts, part_sizes
from pyparallel.layers.vocab_parallel_embedding import vocab_sharding
from pyparallel.models.stage import partition, stages_of_rank
from pyparallel.planner.kept import kept_parts
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import check_choice

BALANCES = ("compute", "memory", "even", "threshold")


@dataclass(frozen=True)
class LayerShard:
    """Parameters of one layer that a rank holds.

    Attributes:
        attention, mlp: of matrices and their cut biases.
        replicated: norms, biases behind a reduction, an MoE's router.
        query_heads, kv_heads: the rank's.
        ffn: features of its dense MLP.
    """

    attention: int
    mlp: int
    replicated: int
    query_heads: int
    kv_heads: int
    ffn: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.mlp + self.replicated


@dataclass(frozen=True)
class StageShard:
    """Parameters that one tp rank of one pp rank holds, of all its stages.

    Attributes:
        layers: how many layers it has.
        embedding, head, final_norm: 0 where another stage has them; ``embedding`` counts the table of
            positions, and ``head`` is 0 where it is the embedding itself.
        vocab: rows of the head that it multiplies; 0 without a head.
        kept: of ``layer_total``, what stays at 16 bits in a checkpoint of fewer.
    """

    layers: int
    layer_total: int
    embedding: int
    head: int
    final_norm: int
    vocab: int
    kept: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.layer_total + self.embedding + self.head + self.final_norm


@lru_cache(maxsize=4096)
def layer_shard(shape: ModelShape, tp: Parts, rank: int, moe: bool = False) -> LayerShard:
    """What ``rank`` of ``tp`` holds of one layer; routed experts are cut by their features.

    Raises:
        ValueError: more ranks than heads.
    """
    layout = _layout(shape, tp)
    query = layout.query[rank][1] - layout.query[rank][0]
    kv = layout.kv[rank][1] - layout.kv[rank][0]
    rows = shape.head_dim * (query + 2 * kv)
    attention = rows * (shape.hidden + shape.qkv_bias) + shape.hidden * shape.head_dim * query
    ffn = _cut(shape.expert_ffn if moe else shape.ffn, tp)[rank]
    up = (shape.mlp_matrices - 1) * ffn
    each = up * (shape.hidden + shape.mlp_bias) + ffn * shape.hidden
    replicated = shape.norms * shape.norm_parameters + 2 * shape.head_dim * shape.qk_norm
    replicated += shape.hidden * shape.out_bias
    mlp = each
    if moe:
        shared = _cut(shape.shared_ffn, tp)[rank] if shape.shared_ffn else 0
        mlp = shape.experts * each + shared * shape.mlp_matrices * shape.hidden
        replicated += shape.experts * (shape.hidden + shape.mlp_bias)
    replicated += (shape.experts if moe else 1) * shape.hidden * shape.mlp_bias
    replicated += shape.sinks * query
    return LayerShard(attention, mlp, replicated, query, kv, 0 if moe else ffn)


@lru_cache(maxsize=1024)
def _layout(shape: ModelShape, tp: Parts) -> HeadLayout:
    # Before a list as long as tp is made: nothing has so many heads.
    most = min(tp, 1 << 16) if isinstance(tp, int) else tp
    return HeadLayout.of(shape.heads, shape.kv_heads, most)


@lru_cache(maxsize=1024)
def _cut(length: int, tp: Parts) -> tuple[int, ...]:
    return tuple(features(length, tp).sizes)


@lru_cache(maxsize=1024)
def _vocab(length: int, tp: Parts) -> tuple[int, ...]:
    return tuple(vocab_sharding(length, tp).sizes)


@lru_cache(maxsize=1024)
def stage_layers(shape: ModelShape, stages: int, balance: str = "compute") -> tuple[range, ...]:
    """The layers of each stage.

    Args:
        balance: "compute" and "memory" as :func:`pyparallel.models.stage.stages_of`; "even": by their
            number alone, as Megatron, with the embedding and the head for layers where only that
            divides; "threshold": a stage ends with the layer that brings the costs so far above its
            share of all, as nanotron, and some may be empty.

    Raises:
        ValueError: more stages than layers, or another balance.
    """
    check_choice("balance", balance, BALANCES)
    if stages == 1:
        return (range(shape.layers),)
    table = float(shape.vocab * shape.hidden)
    moe = float(shape.attention_matrices + shape.mlp_weights(True, active=balance == "compute"))
    dense = float(shape.attention_matrices + shape.mlp_weights(False))
    costs: Sequence[float] = [
        moe if shape.is_moe(layer) else dense for layer in range(shape.layers)
    ]
    first, last = table + shape.learned_positions * shape.hidden, table
    if balance == "even":
        return _by_number(shape.layers, stages)
    if balance == "threshold" and stages <= 8 * shape.layers:
        return _by_threshold(costs, last, stages)
    ends = {"first": first if balance == "memory" else 0.0, "last": last}
    return tuple(partition(costs, stages, **ends))


def _by_number(layers: int, stages: int) -> tuple[range, ...]:
    if layers % stages and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        ends = [min(layers, max(0, place * each - 1)) for place in range(stages + 1)]
        return tuple(range(a, b) for a, b in itertools.pairwise(ends))
    if stages > layers:
        partition([1.0] * layers, stages)
    ends = list(itertools.accumulate(part_sizes(layers, stages), initial=0))
    return tuple(range(a, b) for a, b in itertools.pairwise(ends))


def _by_threshold(costs: Sequence[float], head: float, stages: int) -> tuple[range, ...]:
    total, before, place = sum(costs) + head, 0.0, 0
    starts = [0]
    for layer, cost in enumerate(costs):
        before += cost
        if before > total * (place + 1) / stages and place + 1 < stages:
            place += 1
            starts.append(layer + 1)
    starts += [len(costs)] * (stages + 1 - len(starts))
    return tuple(range(a, b) for a, b in itertools.pairwise(starts))


@lru_cache(maxsize=1024)
def largest_rank(shape: ModelShape, tp: Parts) -> int:
    """The tp rank that holds the most of a layer: not always the first where KV heads are replicated."""
    return max(
        range(len(_layout(shape, tp).query)),
        key=lambda rank: layer_shard(shape, tp, rank, shape.experts > 0).total,
    )


def stage_shard(
    shape: ModelShape, tp: Parts, rank: int, stages: Sequence[int], layers: Sequence[range]
) -> StageShard:
    """What tp ``rank`` holds of ``stages``, where ``layers`` are those of all stages."""
    held = [layer for stage in stages for layer in layers[stage]]
    experts = sum(shape.is_moe(layer) for layer in held)
    total = (len(held) - experts) * layer_shard(shape, tp, rank).total
    if experts:
        total += experts * layer_shard(shape, tp, rank, True).total
    first, last = 0 in stages, len(layers) - 1 in stages
    rows = _vocab(shape.vocab, tp)[rank]
    # A rank of an interleaved schedule may hold both ends, as two modules: no weight is shared then.
    one_module = shape.tied and len(layers) == 1
    return StageShard(
        layers=len(held),
        layer_total=total,
        embedding=(rows + shape.learned_positions) * shape.hidden if first else 0,
        head=rows * shape.hidden if last and not one_module else 0,
        final_norm=shape.norm_parameters if last else 0,
        vocab=rows if last else 0,
        kept=kept_weights(shape, tp, rank, held),
    )


def kept_weights(shape: ModelShape, tp: Parts, rank: int, layers: Sequence[int]) -> int:
    """Weights of ``layers`` that ``rank`` holds at 16 bits where the others have fewer."""
    total = 0
    for layer in layers if shape.kept else ():
        shard = layer_shard(shape, tp, rank, shape.is_moe(layer))
        attention, mlp = kept_parts(shape.kept, layer)
        total += attention * shard.attention + mlp * shard.mlp
    return total


def rank_stages(pp: int, rank: int, virtual_stages: int = 1) -> list[int]:
    """Which stages a pp rank holds: looped, as interleaved 1F1B has them."""
    return stages_of_rank(pp, rank, virtual_stages)
