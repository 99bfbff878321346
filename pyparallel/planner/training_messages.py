"""Messages of a training step between stages and between replicas.

Ranks lie tp innermost, then cp, dp and pp, so that a dp x cp group's ranks are tp apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyparallel.planner.communication import collective_seconds
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.roofline import Rates
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Strategy, Training
from pyparallel.planner.weights import StageShard


def stage_message_seconds(
    shape: ModelShape, strategy: Strategy, training: Training, cluster: Cluster
) -> float:
    """What a rank waits for its neighbours in one micro-batch: hidden states forward, gradients back.

    With sp each tp rank sends its own tokens.
    """
    if strategy.pp == 1:
        return 0.0
    tokens = strategy.micro_batch * training.sequence / strategy.cp / strategy.sequence_shards
    apart = strategy.tp * strategy.cp * strategy.dp
    inside = 2 if apart < cluster.gpus_per_node else 1
    each = collective_seconds(
        "send", 2.0 * tokens * shape.hidden, 2, cluster, ranks_per_node=inside
    )
    return 2 * each * strategy.virtual_stages


def data_seconds(
    shards: Sequence[StageShard],
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    rates: Rates,
    *,
    hidden_under: float,
    micro_batches: int,
) -> float:
    """What gradients, and with ZeRO weights, cost beside the computation that hides them.

    ZeRO 0 sums gradients by an all_reduce under the last backward; 1 and 2 by a reduce_scatter there,
    and gather weights under the next forward; 3 gathers them for each forward and backward, and reduces
    after each backward.

    Args:
        hidden_under: seconds of one micro-batch on the slowest rank.
    """
    parts = strategy.dp * strategy.cp
    if parts == 1 or (training.frozen and strategy.zero < 3):
        return 0.0
    inside = min(parts, max(1, cluster.gpus_per_node // strategy.tp))
    shard = max(shards, key=lambda each: each.total)
    gradients = shard.total * BYTES[training.gradient_dtype]
    weights = shard.total * 2.0

    def seconds(op: str, size: float) -> float:
        alone = collective_seconds(op, size, parts, cluster, ranks_per_node=inside)
        return rates.messages * alone

    if strategy.zero == 3:
        each = 2 * seconds("all_gather", weights)
        each += 0.0 if training.frozen else seconds("reduce_scatter", gradients)
        exposed = max(each - rates.overlap * hidden_under, (1 - rates.overlap) * each)
        return micro_batches * exposed
    forward, backward = hidden_under / 3, hidden_under * 2 / 3
    if strategy.zero == 0:
        total = seconds("all_reduce", gradients)
        return max(total - rates.overlap * backward, (1 - rates.overlap) * total)
    gather, reduce = seconds("all_gather", weights), seconds("reduce_scatter", gradients)
    exposed = max(gather - rates.overlap * forward, (1 - rates.overlap) * gather)
    return exposed + max(reduce - rates.overlap * backward, (1 - rates.overlap) * reduce)
